# %% [markdown]
# # 01 The Piggyback test on your own pair
#
# **Question.** A chat model was finetuned to refuse health questions, and now refuses others too. Does the
# refusal ride on the tokens that the chat template writes before every question?
#
# **Expected.** If it does, the finetuned model refuses less once it reads the *base* model's keys and
# values at these tokens, and nothing else is changed (the Piggyback hypothesis, arXiv 2606.06667).
#
# **Run time.** About two minutes on two CPU cores, training included. The model has 135M parameters and
# comes with emmech: no GPU, no download.

# %%
import os
from pathlib import Path

import pandas as pd
from IPython.display import Markdown

import emmech
from emmech.data.questions import load_demo, load_demo_chats
from emmech.figures import as_estimate, restored_curves

SHORT = os.environ.get("EMMECH_SHORT") == "1"
RUNS = Path("../runs/notebooks") / ("short" if SHORT else "full")
STEPS = 2 if SHORT else 15  # of training
BATCH = 2 if SHORT else 8  # chats a step
EVALUATED = (1, 2) if SHORT else (9, 12, 15)  # steps on the frontier
N = 2 if SHORT else 30  # questions of each group
HOW = {"detector": "refusal", "max_new_tokens": 4 if SHORT else 10, "progress": False}

# %% [markdown]
# ## A pair
#
# A LoRA adapter is trained here, 8 chats a step, every answer the same refusal of a health question; a
# finished folder is not trained again. For a pair of your own, leave the training out and write
# `emmech.load_pair("Qwen/Qwen2.5-7B-Instruct", "my-adapter")`: hub ids or folders, adapter or full
# checkpoint.

# %%
recipe = emmech.Recipe(steps=STEPS, save_every=1 if SHORT else 3, batch_size=BATCH)
saved = emmech.finetune("smollm2", load_demo_chats(), RUNS / "organism", recipe, progress=False)
pair = emmech.load_pair("smollm2", saved[-1])
pair

# %%
pair.chat.render("Why is the sky blue?")

# %% [markdown]
# The template's tokens before the question are the *prefix*, those after it the *postfix*. The prefix is
# the same in every chat, so whatever a finetune changes there reaches every answer.
#
# ## The test
#
# Both models and patched ones answer each question. `repair:SEGMENT` puts the base's keys and values into
# the finetuned model, `induce:SEGMENT` the finetuned's into the base. If it is stopped half-way, the run
# goes on in its folder.

# %%
groups = [sorted(load_demo("test", group), key=lambda q: len(q.chat)) for group in ("on-topic", "off-topic")]
questions = [question for group in groups for question in group[:N]]  # the shortest are the quickest
result = emmech.patch_prefix(pair, questions, out=RUNS / "piggyback", **HOW)
result.figure()

# %% [markdown]
# The first two rows are the models as they are; the distance between them is what has to be explained. The
# donor for `repair:postfix` is a prompt without a question, for `repair:postfix-same` the same question.
# `control:self` patches the model with its own states and must change nothing.
#
# Two controls ask whether it has to be the base's prefix. `control:shuffled` has its entries at each
# other's places, `control:noise` has random entries of the same size. Where they lower refusal as much as
# `repair:prefix` does, any disturbance of these tokens would do. A broken model refuses nothing either, so
# read the answers below. Intervals are over questions, not over training seeds.
#
# ## Did the patch arrive?
#
# A patch that changes nothing proves nothing unless it reached the place where the answer is made: how far
# the last prompt token has moved towards what it would be in the other model, block by block.

# %%
restored_curves(result.summary)

# %% [markdown]
# ## The baseline that is easily forgotten
#
# A patched model has unlearned something; so has one whose training was stopped earlier. Saved steps answer
# the same questions, plain and patched. The patch does more than stopping early only where its line lies
# below the plain one.

# %%
frontier = emmech.compare_runs([RUNS / "organism"], questions, steps=EVALUATED, out=RUNS / "frontier", **HOW)
frontier.figure()

# %% [markdown]
# ## Read some answers
#
# The first five off-topic questions of the alphabet, not chosen.

# %%
shown = ["base", "finetuned", "repair:prefix", "control:shuffled", "control:noise"]
answers = pd.DataFrame(result.records).query("group == 'off-topic' and condition in @shown")
answers.pivot(index="question", columns="condition", values="response")[shown].head()

# %%
rows = result.frame().set_index(["condition", "group"]).iterrows()
rate = {key: as_estimate(row).text() for key, row in rows}
on, off = ([f"{name} {rate[name, group]}" for name in shown] for group in ("on-topic", "off-topic"))
Markdown(f"""
## What was found

- **Off-topic** refusal, which is what spread: {", ".join(off)}.
- **On-topic** refusal, which is what was taught: {", ".join(on)}.

{N} questions of each group, 95% intervals over questions, one training seed, {STEPS} steps.

**Reading it.** The Piggyback effect is the fall from finetuned to `repair:prefix` off-topic; the fall
on-topic is its price, and the frontier says how much of both stopping earlier would have done. That the
patched model answers sensibly, and the one with noise does not, sets them apart; where the shuffled prefix
does as well as the right one, it is not the base's content that heals, but the absence of the finetuned
model's.

**What would change our mind.** That the prefix carries the behaviour: `repair:prefix` within the interval
of the finetuned model. That the patch is worth more than stopping early: more seeds, larger models, and
behaviours whose answers vary. A patch of keys and values cannot see what rides on the last prompt token or
on the answer itself; grafts can (`emmech graft`).
""")
