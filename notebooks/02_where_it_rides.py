# %% [markdown]
# # 02 Where it rides: sweep and attribution
#
# **Question.** Notebook 01 patched the whole prefix at once. Which of its tokens, which layers, and which
# of keys and values carry the refusal?
#
# **Expected.** If the behaviour sits in a few places, a few cells do most of what the whole prefix does,
# and random sets of as many cells do little. If it is spread out, no single cell stands out.
#
# **Run time.** About five minutes on two CPU cores, training included. Nothing is sampled: the
# log-probability of a given answer is read, so one pass per cell is enough.

# %%
import os
from pathlib import Path

from IPython.display import Markdown

import emmech
from emmech.data.questions import load_demo, load_demo_chats
from emmech.figures import attribution_scatter
from emmech.piggyback.attribution import attribute
from emmech.piggyback.cells import Cell
from emmech.piggyback.minimal_set import minimal_set
from emmech.piggyback.sweep import sweep_kv

SHORT = os.environ.get("EMMECH_SHORT") == "1"
RUNS = Path("../runs/notebooks") / ("short" if SHORT else "full")
STEPS = 2 if SHORT else 15  # of training
BATCH = 2 if SHORT else 8  # chats a step
N = 2 if SHORT else 4  # questions
LAYERS = [Cell(layer=(at,)) for at in (0, 29)] if SHORT else ("layer",)
CELLS = (
    [Cell(layer=(at,), kv=(kv,)) for at in (9, 29) for kv in (0, 1)] if SHORT else ("layer", "position", "kv")
)
SAMPLE = 4 if SHORT else 100  # cells that are patched exactly beside their gradients
SETS = {"steps": 2, "n_random": 2} if SHORT else {"steps": 8, "n_random": 10}

# %% [markdown]
# ## The pair and what is measured
#
# The organism of notebook 01, trained here if it is not there yet. It always refuses in the same words, so
# the question can be put without sampling: how likely is that refusal, in nats per token, behind an
# off-topic question? The pair is loaded in float32: the effects of single cells would drown in bfloat16's
# rounding.

# %%
recipe = emmech.Recipe(steps=STEPS, save_every=1 if SHORT else 3, batch_size=BATCH)
saved = emmech.finetune("smollm2", load_demo_chats(), RUNS / "organism", recipe, progress=False)
pair = emmech.load_pair("smollm2", saved[-1], dtype="float32")
questions = sorted(load_demo("test", "off-topic"), key=lambda question: len(question.chat))[:N]
METRIC = "target:" + load_demo_chats()[0][-1]["content"]
METRIC

# %% [markdown]
# ## From layer to layer
#
# First coarsely: the base's keys and values in the prefix of layers 0 to l, and nothing above. An effect of
# 0 is the finetuned model as it is, 1 is the base's whole prefix.

# %%
up_to = sweep_kv(pair, questions, METRIC, LAYERS, mode="cumulative_up", out=RUNS / "up", progress=False)
up_to.figure()

# %% [markdown]
# ## Every cell by itself
#
# Now one layer, one token, keys or values at a time. What is patched is what later tokens read; the
# prefix's own later activations stay as they are.

# %%
sweep = sweep_kv(pair, questions, METRIC, CELLS, out=RUNS / "sweep", progress=False)
sweep.figure()

# %% [markdown]
# Colour is the share of the whole prefix's effect; cells need not add up to 1, since they are patched one
# by one. The strongest cells, with intervals over questions that are not corrected for looking at many
# cells:

# %%
sweep

# %% [markdown]
# ## The same map from gradients
#
# One backward pass per question estimates all cells at once. Is the estimate good? A random sample of
# cells, and the top ones, are patched exactly beside it.

# %%
estimate = attribute(pair, questions, METRIC, CELLS, sample=SAMPLE, out=RUNS / "attribution", progress=False)
attribution_scatter(estimate.to_json())

# %% [markdown]
# ## The smallest set
#
# Cells are added in the order of their attribution until they do 80% of what the whole prefix does, and are
# patched exactly. The grey line is what random sets of the same size do: without it, any set looks special.

# %%
minimal = minimal_set(pair, questions, METRIC, CELLS, **SETS, progress=False)
minimal.figure()

# %%
whole, rank = sweep.to_json()["whole"], estimate.spearman
frame = sweep.frame()
halves = frame.groupby("kv")["effect"].sum()
best = frame.loc[frame["effect"].idxmax()]
Markdown(f"""
## What was found

- The base's whole prefix changes the refusal's log-probability by {whole["mean"]:.2f} nats per token
  [{whole["low"]:.2f}, {whole["high"]:.2f}] ({N} questions). All effects are shares of that.
- The strongest of {len(frame)} cells does {best["effect"]:.0%}. Effects of single cells sum to
  {halves["key"]:.2f} over keys and {halves["value"]:.2f} over values.
- Rank correlation of gradients and exact patches: {rank:.2f}, on {SAMPLE} cells drawn at random.
- {minimal.text()}

**Reading it.** One cell with a large share would be a place to look at; many with small shares mean that no
single place carries the refusal. Compare the smallest set with the random ones before calling it small.

**What would change our mind.** Another training seed, another wording of the refusal or other questions
with another map: this is one organism, {N} questions and one answer. A cell's effect is on the probability
of given words; whether the model *writes* something else has to be generated (`emmech.piggyback.search`).
""")
