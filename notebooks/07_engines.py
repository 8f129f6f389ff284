# %% [markdown]
# # 07 The same patch in TransformerLens and nnsight
#
# **Question.** Your own code is in TransformerLens or nnsight. Is the prefix patch there the one that
# emmech makes?
#
# **Expected.** Yes: emmech overwrites the cache as it is written, the others replace the outputs of the key
# and value projections, and in float32 the logits agree to 1e-4 and the greedy answers word by word.
#
# **Run time.** About one minute on two CPU cores, training included; each engine holds its own copy of the
# 135M model.

# %%
import os
from pathlib import Path

import pandas as pd
import torch
from IPython.display import Markdown

import emmech
from emmech.data.questions import load_demo, load_demo_chats
from emmech.engines.in_traces import kv_edits, kv_places, record, traced_answers, traced_logits
from emmech.engines.on_bridge import masks, patch_hooks
from emmech.models.views import bridge, nnsight_view

SHORT = os.environ.get("EMMECH_SHORT") == "1"
RUNS = Path("../runs/notebooks") / ("short" if SHORT else "full")
STEPS = 2 if SHORT else 15  # of training
BATCH = 2 if SHORT else 8  # chats a step
N = 2 if SHORT else 8  # questions
NEW_TOKENS = 4 if SHORT else 12

# %% [markdown]
# ## One pair, one batch
#
# The organism of notebook 01, trained here if it is not there yet. Off-topic questions of different lengths
# make a left-padded batch, where positions and masks can go wrong.

# %%
recipe = emmech.Recipe(steps=STEPS, save_every=1 if SHORT else 3, batch_size=BATCH)
saved = emmech.finetune("smollm2", load_demo_chats(), RUNS / "organism", recipe, progress=False)
pair = emmech.load_pair("smollm2", saved[-1], dtype="float32")
questions = [question.chat for question in load_demo("test", "off-topic")[:N]]
logits, answers = {}, {}
pair

# %% [markdown]
# ## emmech
#
# `patch_kv` gives inputs and a cache for the unmodified Hugging Face model, so `generate` works as it is.

# %%
patched = emmech.patch_kv(pair, questions, segments=("prefix",), source="base")
batch = patched.batch
with torch.no_grad(), pair.finetuned.active() as model:
    unpatched = model(**batch.part(0)).logits[:, -1]
    logits["emmech"] = model(**batch.part(0), past_key_values=patched.cache()).logits[:, -1]
    made = model.generate(
        **patched.inputs, past_key_values=patched.cache(), max_new_tokens=NEW_TOKENS, do_sample=False,
        pad_token_id=pair.chat.end_ids[0],
    )  # fmt: skip
answers["emmech"] = made[:, batch.input_ids.shape[1] :]
batch.input_ids.shape

# %% [markdown]
# ## TransformerLens
#
# A bridge takes a model apart, so each side gets a copy. The patch is a list of hooks: put your own behind
# them, or look at what they leave with `run_with_cache`.

# %%
base, tuned = bridge(pair, "base"), bridge(pair, "finetuned")
hooks = patch_hooks(base, batch, segments=("prefix",))
with torch.no_grad():
    run = tuned.run_with_hooks(batch.input_ids, fwd_hooks=hooks, **masks(batch))
    logits["TransformerLens"] = run[:, -1]
with tuned.hooks(fwd_hooks=hooks):
    made = tuned.generate(
        batch.input_ids, attention_mask=batch.attention_mask, max_new_tokens=NEW_TOKENS, do_sample=False,
        stop_at_eos=False, return_type="tokens", verbose=False,
    )  # fmt: skip
answers["TransformerLens"] = made[:, batch.input_ids.shape[1] :]
hooks[0][0], len(hooks)

# %% [markdown]
# ## nnsight
#
# A view of the pair's own module: no copy. The side that is active is the one that is traced. The same
# edits run as a server would run them (`remote="local"`, serialised), and on NDIF (`remote=True`) with
# models that do not fit here.

# %%
view = nnsight_view(pair)
with pair.base.active():
    donor = record(view, batch, kv_places(view))
with pair.finetuned.active():
    edits = kv_edits(view, batch, donor, segments=("prefix",))
    logits["nnsight"] = traced_logits(view, batch, edits)[:, -1]
    logits["nnsight, serialised"] = traced_logits(view, batch, edits, remote="local")[:, -1]
    answers["nnsight"] = traced_answers(view, batch, edits, max_new_tokens=NEW_TOKENS)

# %% [markdown]
# ## Do they agree?
#
# The largest difference of any logit of the answer's first token from emmech's. The row *unpatched* says
# what the patch itself changes: a difference that is small beside it, and not merely small, is agreement.

# %%
ours = logits["emmech"]
rows = {
    name: (theirs - ours).abs().max().item() for name, theirs in {**logits, "unpatched": unpatched}.items()
}
difference = pd.Series(rows, name="largest difference of a logit")
difference.map("{:.1e}".format).to_frame()


# %%
def until_end(row):
    at = (place for place, token in enumerate(row) if int(token) in pair.chat.end_ids)
    return pair.chat.tokenizer.decode(row[: next(at, len(row))])


words = {name: [until_end(row) for row in made] for name, made in answers.items()}
pd.DataFrame(words, index=questions)

# %%
same = {
    name: sum(a == b for a, b in zip(texts, words["emmech"], strict=True)) for name, texts in words.items()
}
worst = max(value for name, value in rows.items() if name in logits)
Markdown(f"""
## What was found

- Largest difference between engines: {worst:.1e}; what the patch changes: {rows["unpatched"]:.1f}.
- Greedy answers equal to emmech's, of {N}: {", ".join(f"{name} {n}" for name, n in same.items())}.

**Reading it.** The engines make the same patch, so choose by what else you need: hooks and caches by name
(TransformerLens), traces that can run elsewhere (nnsight), or many conditions, donors from other prompts,
other segments and large grids at little more than the cost of the forward passes (emmech).

**What would change our mind.** A difference above 1e-4 in float32 on an architecture that we test (Llama,
Qwen, Gemma 3, GPT-NeoX, Phi-3) is a bug. In bfloat16 the engines round differently, and greedy answers may
part; that is no bug.
""")
