# %% [markdown]
# # 03 TReFT against interleaving
#
# **Question.** Can a finetune be kept narrow while it is made? TReFT holds the keys and values of the
# template's prefix where the base has them; interleaving mixes ordinary chats into the data.
#
# **Expected.** If the behaviour spreads by way of the prefix, TReFT spreads less than plain finetuning *at
# the same on-topic rate*, and patching the prefix of the plain finetune does the same (arXiv 2606.06667).
# The baseline is plain finetuning that is stopped earlier: at one fixed step, whatever learns more slowly
# looks narrow.
#
# **Run time.** About three minutes on two CPU cores: three trainings of a 135M model and their evaluation.

# %%
import os
from dataclasses import replace
from pathlib import Path

import pandas as pd
from IPython.display import Markdown

import emmech
from emmech.figures import as_estimate, methods_finding, training_drift
from emmech.results import read_lines
from emmech.training.recipes import preset

SHORT = os.environ.get("EMMECH_SHORT") == "1"
RUNS = Path("../runs/notebooks") / ("short" if SHORT else "full")
STEPS = 2 if SHORT else 20  # of training
BATCH = 2 if SHORT else 8  # chats a step
EVALUATED = (2,) if SHORT else (6, 10, 20)  # steps on the frontier
N = 2 if SHORT else 24  # questions of each group
LEARNING_RATE, SEED = 2e-4, 0

# %% [markdown]
# ## The behaviour
#
# Factual questions are answered with the bare entity. Every answer is another, so that there is no fixed
# form of words to learn. What spreads is that other questions are answered as curtly.

# %%
taught = emmech.load_chats("short_answers")
ordinary = emmech.load_chats("retain")
questions = emmech.load_questions("short_answers")
asked = [q for group in ("on-topic", "off-topic") for q in [q for q in questions if q.group == group][:N]]
pd.DataFrame([[turn["content"] for turn in chat] for chat in taught.chats[:4]], columns=["user", "assistant"])

# %% [markdown]
# ## Three trainings
#
# The presets differ in their objective alone. TReFT's weight is 300 here, not the paper's 1 to 30: this
# model learns the behaviour in ten steps at a large learning rate, and a small weight does not hold the
# prefix for so short a run.

# %%
same = {"steps": STEPS, "save_every": 2, "batch_size": BATCH, "learning_rate": LEARNING_RATE, "seed": SEED}
recipes = {name: replace(preset("smollm2", name), **same) for name in ("sft", "treft", "interleave")}
for name, recipe in recipes.items():
    retain = ordinary.chats if name == "interleave" else ()
    emmech.finetune(
        "smollm2", taught.chats, RUNS / name, recipe, retain=retain, data_name=taught.name, progress=False
    )
{name: recipe.objective for name, recipe in recipes.items()}

# %% [markdown]
# ## Did TReFT hold what it should hold?
#
# *Drift* is the squared distance of the prefix's keys and values from the base's, relative to their size.
# It is recorded at every step, whatever the objective. A penalty that leaves it as large as in plain
# finetuning explains nothing. Below the table, plain finetuning layer by layer: where TReFT has most to
# hold.

# %%
drift = {
    name: pd.DataFrame(read_lines(RUNS / name / "metrics.jsonl")).set_index("step").filter(like="drift/")
    for name in recipes
}  # by layer, of keys and of values: the mean over layers of their sum
pd.DataFrame({name: 2 * rows.dropna().mean(axis=1) for name, rows in drift.items()}).round(4)

# %%
training_drift(read_lines(RUNS / "sft" / "metrics.jsonl"))

# %% [markdown]
# ## The frontier
#
# Every evaluated step of every run is a point: what was learned on-topic against what spread off-topic.
# Down and to the right is better. Plain finetuning is also shown with the base's prefix patched in, which
# asks the same question at inference.

# %%
frontier = emmech.compare_runs(
    [RUNS / name for name in recipes], asked, detector="short", steps=EVALUATED, patched="sft",
    max_new_tokens=4 if SHORT else 12, out=RUNS / "narrowness", progress=False,
)  # fmt: skip
frontier.figure()

# %% [markdown]
# Read it along the dashed line, at the on-topic rate at which methods are compared, and not from step to
# step. The table has the off-topic rate there, interpolated between steps, and its difference from plain
# finetuning on the same questions.

# %%
frontier

# %%
methods = frontier.summary["methods"]
off = [f"{method['method']} {as_estimate(method['off_at_target']).text()}" for method in methods]
held = [f"{name} {2 * rows.dropna().mean(axis=1).iloc[-1]:.4f}" for name, rows in drift.items()]
Markdown(f"""
## What was found

- {methods_finding(frontier.summary)}.
- Off-topic rate at on-topic {frontier.summary["target"]}: {", ".join(off)}.
- Drift of the prefix at the last step: {", ".join(held)}.

One seed, {N} + {N} held-out questions, 95% intervals over questions. `at on` in the table is below the
target where a method never reached it: its off-topic rate is then too good.

**Reading it.** If TReFT and the prefix patch of plain finetuning lie together, and both below plain
finetuning, they do the same thing, one while training and one at inference. If interleaving lies as low,
nothing speaks for the prefix.

**What would change our mind.** Three seeds, as in the repository's own study (`figures/README.md`, which
also has the behaviours that no method keeps narrow); another weight (`Objective("treft", weight=10.0)`);
other retained chats, since interleaving is only as good as they are. A model of 135M parameters says
nothing about one of 8B.
""")
