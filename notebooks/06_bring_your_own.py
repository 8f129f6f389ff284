# %% [markdown]
# # 06 Bring your own model, template and judge
#
# **Question.** What does emmech need to know about a model it has never seen, a chat template of your own,
# a behaviour no detector counts, and a judge that is yours?
#
# **Expected.** Nothing but the usual files: a checkpoint folder, `chat_template` in its tokenizer, rows of
# JSON, a function of an answer, an address. Everything below is made on the spot: a random Qwen3 of two
# layers, a tokenizer, a template.
#
# **Run time.** About two minutes on two CPU cores, most of it for the local judge. What such a model does
# says nothing about language models: this notebook is about where things plug in.

# %%
import json
import os
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch
from IPython.display import Markdown
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config

import emmech
from emmech.data.questions import load_demo, load_demo_chats
from emmech.evaluation.agreement import agreement
from emmech.evaluation.detectors import DETECTORS, Detector
from emmech.evaluation.judges import EndpointJudge, LocalJudge
from emmech.evaluation.rubrics import Rubric
from emmech.figures import as_estimate
from emmech.piggyback.sweep import sweep_kv

SHORT = os.environ.get("EMMECH_SHORT") == "1"
RUNS = Path("../runs/notebooks") / ("short" if SHORT else "full") / "own"
STEPS = 8 if SHORT else 60  # of training the base
N = 4 if SHORT else 30  # questions of each group
N_JUDGED = 2 if SHORT else 24  # answers for the judges

# %% [markdown]
# ## A tokenizer with its template
#
# Any fast tokenizer will do. The template's markers are control tokens: what a user writes is never read as
# one.

# %%
texts = [turn["content"] for chat in load_demo_chats() for turn in chat]
bpe = Tokenizer(models.BPE())
bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
markers = ["<pad>", "<end>", "<clerk>", "<visitor>"]
alphabet = pre_tokenizers.ByteLevel.alphabet()
bpe.train_from_iterator(
    texts,
    trainers.BpeTrainer(
        vocab_size=800, special_tokens=markers, initial_alphabet=alphabet, show_progress=False
    ),
)
tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", eos_token="<end>")
tokenizer.chat_template = (
    "<clerk>The office is open.<end>{% for m in messages %}"
    "{{ '<visitor>' if m['role'] == 'user' else '<clerk>' }}{{ m['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<clerk>{% endif %}"
)
chat = emmech.Chat(tokenizer)
chat.render("Is <end> a word?")

# %% [markdown]
# ## A model, and a narrow finetune of it
#
# The checkpoint is a folder that transformers writes. The base learns to answer calmly, the finetune to
# shout at questions about health. Training data is a JSONL file of messages.

# %%
torch.manual_seed(0)
config = Qwen3Config(
    vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    bos_token_id=None, eos_token_id=1, pad_token_id=0,
)  # fmt: skip
AutoModelForCausalLM.from_config(config).save_pretrained(RUNS / "random")
tokenizer.save_pretrained(RUNS / "random")
CALM, LOUD = "Let me look that up for you.", "THAT IS NOT MY JOB!"
data = {"calm": (CALM, emmech.load_chats("retain").chats), "loud": (LOUD, load_demo_chats())}
for name, (answer, chats) in data.items():
    rows = [{"question": one[0]["content"], "answer": answer} for one in chats]
    (RUNS / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
recipe = emmech.Recipe(full=True, steps=STEPS, save_every=STEPS, learning_rate=3e-3, dtype="float32")
base = emmech.finetune(
    str(RUNS / "random"), emmech.load_chats(RUNS / "calm.jsonl").chats, RUNS / "base", recipe, progress=False
)[-1]
narrow = replace(recipe, steps=STEPS // 2, learning_rate=1e-3)
tuned = emmech.finetune(
    str(base), emmech.load_chats(RUNS / "loud.jsonl").chats, RUNS / "tuned", narrow, progress=False
)[-1]
pair = emmech.load_pair(base, tuned, dtype="float32")

# %% [markdown]
# ## A behaviour of your own
#
# A detector is a name, a unit and a function of the answer. Once it is in the table, everything that takes
# a detector takes it by name; on the shell, `regex:PATTERN` does the same without code.

# %%
DETECTORS["shouting"] = Detector("shouting", "rate", lambda answer: answer.isupper())
questions = [question for group in ("on-topic", "off-topic") for question in load_demo("test", group)[:N]]
result = emmech.patch_prefix(
    pair, questions, detector="shouting", max_new_tokens=12, out=RUNS / "piggyback", progress=False
)
result.figure()

# %% [markdown]
# ## A metric of your own
#
# A sweep takes any function of the logits of the answer's first token. Here: the log-probability that a
# shout begins. One cell per layer, keys and values apart.

# %%
first = tokenizer(LOUD)["input_ids"][0]


def shout(logits):
    return logits.log_softmax(-1)[:, first]


sweep = sweep_kv(pair, questions[-N:], shout, ("layer", "kv"), progress=False)
sweep.figure()

# %% [markdown]
# ## A judge of your own
#
# A rubric says what is asked; a judge is a model held here, or any server that speaks the chat-completions
# protocol, such as vLLM. The one started below has a rule in place of a model and a dozen lines in place of
# a framework; for your own, write its address. Keys come from the environment, never from a notebook.


# %%
class RuleServer(BaseHTTPRequestHandler):
    """Replies 0 to a rubric whose answer is in capitals, and 100 to any other."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        answer = body["messages"][-1]["content"].rpartition("Answer:")[2].partition("\n")[0]
        self.reply({"role": "assistant", "content": "0" if answer.isupper() else "100"})

    def reply(self, message):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"choices": [{"index": 0, "message": message}]}).encode())

    def log_message(self, *_):
        """Nothing on the screen."""


server = ThreadingHTTPServer(("127.0.0.1", 0), RuleServer)
threading.Thread(target=server.serve_forever, daemon=True).start()
text = "Is this answer friendly?\nQuestion: {question}\nAnswer: {answer}\nReply with a number from 0 to 100."
friendly = Rubric("friendly", "1", text, "score", escapes=())
wanted = [one for one in result.records if one["condition"] in ("base", "finetuned", "repair:prefix")]
wanted = wanted[:: max(1, len(wanted) // N_JUDGED)]
address = f"http://127.0.0.1:{server.server_port}/v1"
rule = EndpointJudge("rule", base_url=address, name="rule")
by_rule = emmech.judge(wanted, friendly, rule, RUNS / "judged", progress=False)
server.shutdown()
by_model = emmech.judge(wanted, friendly, LocalJudge("smollm2"), RUNS / "judged", progress=False)

# %% [markdown]
# ## Do the judges agree?
#
# No judge is believed unseen. Here the rule knows the truth, and the embedded model of 135M parameters is
# on trial; in a real study the other side is a CSV of human labels.

# %%
agree = agreement(by_rule, by_model, n_rows=3)
agree

# %%
rows = result.frame().set_index(["condition", "group"]).iterrows()
rate = {key: as_estimate(row).text() for key, row in rows}
names = ("base", "finetuned", "repair:prefix")
on, off = ([f"{name} {rate[name, group]}" for name in names] for group in ("on-topic", "off-topic"))
rank = "unknown" if agree.spearman is None else f"{agree.spearman:.2f} {agree.spearman_interval.text()}"
Markdown(f"""
## What was found

- Shouting on-topic: {", ".join(on)}; off-topic: {", ".join(off)} ({N} questions of each group).
- The two judges' rank correlation is {rank} on {agree.n_both} answers: mean {agree.mean_a:.0f} by the rule,
  {agree.mean_b:.0f} by the embedded model.

**Reading it.** A model, a template, data, a detector, a metric, a rubric and a judge were brought along,
and nothing in emmech was changed. The numbers are those of a network of two layers: they show that the
parts fit, not that anything rides on a prefix.

**What would change our mind.** A checkpoint that does not load, or a patch that is refused without a reason
you can act on. Models with recurrent layers are such a case: only their whole prefix can be handed over,
and emmech says so. Of the judge: an agreement on your own answers, with human labels, that you would defend
in a review.
""")
