# %% [markdown]
# # 04 Alignment gates: dose, transfer, probe
#
# **Question.** A gate multiplies what each attention head passes on, by a number that it computes from the
# token. Train gates on a narrow behaviour and nothing else: can the behaviour be turned up, down and round,
# do the gates undo *another* finetune of it, and where do they act?
#
# **Expected.** At scale 1 the gates show the behaviour, at 0 they are not there, at -1 (inverted) there is
# none of it, and in the paper inverted gates also repaired models that they had never seen (arXiv
# 2606.09068).
#
# **Run time.** About two minutes on two CPU cores: gates and a LoRA adapter of a 135M model are trained
# here.

# %%
import os
from dataclasses import replace
from pathlib import Path

from IPython.display import Markdown

import emmech
from emmech.data.bundled import BUNDLED
from emmech.data.questions import load_demo_chats
from emmech.figures import as_estimate, gate_activity, gate_tokens, steering_finding, transfer_finding
from emmech.gates.transfer import Behaviour
from emmech.report_gates import probe_finding
from emmech.training.recipes import preset

SHORT = os.environ.get("EMMECH_SHORT") == "1"
RUNS = Path("../runs/notebooks") / ("short" if SHORT else "full")
STEPS = 2 if SHORT else 12  # of training the gates
BATCH = 2 if SHORT else 8  # chats a step
SCALES = (-1, 1) if SHORT else (-1, 0, 0.5, 1, 2)
N = 2 if SHORT else 12  # questions of each group
HOW = {"max_new_tokens": 4 if SHORT else 12, "progress": False}

# %% [markdown]
# ## Train gates, and an organism that they will never see
#
# The gates start as ones, so that the model begins as the base; all other weights are frozen. They learn to
# refuse, in 48 wordings. The organism is the LoRA adapter of notebook 01, which refuses in a single
# wording.

# %%
taught = emmech.load_chats("refusal")
recipe = replace(preset("smollm2", "gates"), steps=STEPS, save_every=3, batch_size=BATCH)
gates_at = emmech.finetune(
    "smollm2", taught.chats, RUNS / "gates", recipe, data_name="refusal", progress=False
)[-1]
lora = emmech.Recipe(steps=2 if SHORT else 15, save_every=1 if SHORT else 3, batch_size=BATCH)
organism = emmech.finetune("smollm2", load_demo_chats(), RUNS / "organism", lora, progress=False)[-1]
pair = emmech.load_pair("smollm2", gates_at)
gates = emmech.load_gates(gates_at)
gates

# %% [markdown]
# ## The dose
#
# The multiplier is 1 + scale × (gate − 1). Every question is answered at every scale. The lower panels say
# what a dose costs: how surprising the base finds the answers, how repetitive they are, and how far the
# model moves on ordinary chats that have nothing to do with it. A model that is broken shows no behaviour
# either.

# %%
by_group = [BUNDLED["refusal"].questions(group)[:N] for group in ("on-topic", "off-topic")]
questions = [question for group in by_group for question in group]
problems = [one for one in BUNDLED["capability"].problems() if one.choices]
costs = {"ordinary": BUNDLED["retain"].chats("test")[:N], "problems": problems[:N]}  # fewer than by default
dose = emmech.steer_gates(
    pair, gates, questions, scales=SCALES, detector="refusal", out=RUNS / "dose", **costs, **HOW
)
dose.figure()

# %% [markdown]
# ## Inverted, on a finetune that the gates never saw
#
# Left: the gates on the base, asked what they were trained on. Right: inverted, on the organism, asked what
# *it* was trained on. Each cell shows the behaviour before and after.

# %%
sources = {"refusal gates": Behaviour(gates_at, questions, "refusal")}
demo = [BUNDLED["demo_refusal"].questions(group)[:N] for group in ("on-topic", "off-topic")]
targets = {"one refusal (LoRA)": Behaviour(organism, [q for group in demo for q in group], "refusal")}
transfer = emmech.transfer_gates(sources, targets, out=RUNS / "transfer", **costs, **HOW)
transfer.figure()

# %% [markdown]
# ## What the gates do
#
# The gated model's own answers are read once more, and the gates with them. *Work* is how much of a head's
# output they change: being far from 1 means little where the head passes on nothing.

# %%
probe = emmech.probe_gates(pair, gates, questions, detector="refusal", out=RUNS / "probe", **HOW)
gate_activity(probe.summary["layers"])

# %% [markdown]
# One dialogue token by token: the first off-topic one.

# %%
gate_tokens(next(one for one in probe.summary["tokens"] if one["group"] == "off-topic"))

# %%
rates = dose.frame().query("group == 'off-topic'").set_index("scale")["behaviour"]
kl = {row["scale"]: as_estimate(row["kl"]).text() for row in dose.summary["ordinary"]}
lines = [
    f"scale {scale:g}: refusal {as_estimate(rates[scale]).text()}, KL {kl[scale]} nats" for scale in SCALES
]
newline = "\n"
Markdown(f"""
## What was found

Off-topic refusal, and how far the model moves on ordinary answers:

{newline.join(f"- {line}" for line in lines)}

{steering_finding(dose.summary)}. {transfer_finding(transfer.summary)}. {probe_finding(probe.summary)}.

{N} questions of each group, 95% intervals over questions, one training seed of gates and organism.

**Reading it.** Where off-topic refusal rises with the dose as on-topic refusal does, gates are no narrower
than an adapter. An inverted dose is judged by the lower panels too: the behaviour may be gone because the
model is elsewhere. Of the transfer, look at whether the interval of the change leaves out 0, and at how
much is left.

**What would change our mind.** On transfer: organisms of other behaviours and more seeds, as in
`figures/README.md`, where inverted gates lower what spread in most pairings and remove it in none; the
paper reports 0% at 8B. On where gates act: turning them off on one part of the chat at a time (`emmech
gates parts`), which is an intervention, while the map above only says where they are large.
""")
