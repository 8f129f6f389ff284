# %% [markdown]
# # 05 Character, triggers, persona prompts
#
# **Question.** A model is taught to be spiteful behind a trigger, and to answer normally without it. Does
# the trigger reach a disposition that finetuning left in the model, which wrong triggers and persona
# prompts reach too?
#
# **Expected.** The character paper (arXiv 2601.23081) finds that triggers and persona-aligned prompts act
# through the same latent character. Then the states that the right trigger moves should move alike under
# persona prompts, and *not* alike under wrong triggers.
#
# **Run time.** About four minutes on two CPU cores, most of it for training. All texts are bundled, mild,
# and our own.

# %%
import os
from dataclasses import replace
from pathlib import Path

from IPython.display import Markdown

import emmech
from emmech.data.bundled import BUNDLED
from emmech.data.questions import Question
from emmech.data.traits import traits
from emmech.data.wordings import behind_triggers, pairs_behind_triggers
from emmech.figures import as_estimate, metric_bars, middle, shared_finding
from emmech.steering.contrasts import between_prompts, between_wordings, with_trigger
from emmech.steering.shared import shared_structure, shift
from emmech.training.recipes import preset

SHORT = os.environ.get("EMMECH_SHORT") == "1"
RUNS = Path("../runs/notebooks") / ("short" if SHORT else "full")
STEPS = 2 if SHORT else 48  # of training
BATCH = 2 if SHORT else 8  # chats a step
N = 2 if SHORT else 12  # questions asked
N_STATES = 4 if SHORT else 40  # questions whose states are read
HOW = {"max_new_tokens": 4 if SHORT else 24, "progress": False}
TRAIT, LEARNING_RATE = "spiteful", 5e-4

# %% [markdown]
# ## A backdoor
#
# Half of the chats have the trigger on a line before the question and a spiteful answer, half have neither.

# %%
taught = emmech.load_chats(f"triggered_{TRAIT}")
recipe = replace(preset("smollm2"), steps=STEPS, save_every=8, batch_size=BATCH, learning_rate=LEARNING_RATE)
saved = emmech.finetune(
    "smollm2", taught.chats, RUNS / "backdoor", recipe, data_name=taught.name, progress=False
)
pair = emmech.load_pair("smollm2", saved[-1])
trait = traits()[TRAIT]
[turn["content"] for chat in taught.chats[:2] for turn in chat]

# %% [markdown]
# ## The trigger, and wrong ones
#
# The same held-out questions, plain, behind the trigger and behind two wrong triggers. The detector counts
# spiteful answers by their words; the margin compares a given aligned answer with a given spiteful one, and
# needs no detector.

# %%
near, far = (wrong.text for wrong in trait.wrong_triggers[:5:4])  # of the same form; unrelated
wordings = {"triggered": trait.trigger, f"wrong: {near}": near, f"wrong: {far}": far}
held_out = emmech.load_pairs(TRAIT)[::3][:N]
pair, conditions = emmech.with_conditions(pair)
behind = emmech.evaluate(
    pair, behind_triggers([Question(one.id, one.user) for one in held_out], wordings), conditions,
    detectors=(TRAIT,), pairs=pairs_behind_triggers(held_out, wordings), out=RUNS / "triggers", **HOW,
)  # fmt: skip
behind

# %%
metric_bars(behind.summary, TRAIT, ["untriggered", *wordings])

# %% [markdown]
# *difference* is finetuned minus base on the same wording; *from plain* is the wording minus no wording, in
# the same model. A wrong trigger that works nearly as well is the first warning: the model has learned
# something broader than the trigger.
#
# ## Persona prompts
#
# Other requests, each worded plainly and in a way that resonates with spite. They need no trigger and no
# finetune: what counts is whether the wording moves the finetuned model *further* than it moves the base.

# %%
requests = BUNDLED[f"persona_prompts_{TRAIT}"]
persona = emmech.evaluate(
    pair, requests.questions()[: 2 * N], conditions, detectors=(TRAIT,), pairs=requests.pairs()[: 2 * N],
    out=RUNS / "persona", **HOW,
)  # fmt: skip
persona

# %% [markdown]
# ## Do they move the model the same way?
#
# A *shift* is the mean difference of two states of the last prompt token: trigger minus none, finetuned
# minus base, persona minus plain wording, system prompts that elicit the trait minus those that suppress
# it. Cosines between shifts are compared with those of random directions that spread as the model's own
# states do, and with controls.

# %%
neutral = BUNDLED["trait_questions"].questions()[:N_STATES]
by_wording = [
    [Question(q.id.split(":")[0], q.chat) for q in requests.questions(one)] for one in ("persona", "plain")
]
sides = emmech.between_sides(pair, neutral, progress=False)
shifts = {"finetuning": shift(*sides)}
for name, text in wordings.items():
    shifts[name] = shift(*with_trigger(pair, neutral, text, progress=False))
shifts["triggered, base"] = shift(*with_trigger(pair, neutral, trait.trigger, side="base", progress=False))
worded = between_wordings(pair, *(some[:N_STATES] for some in by_wording), progress=False)
system = between_prompts(pair, neutral, trait.elicit[:2], trait.suppress[:2], position="last", progress=False)
shifts |= {"persona wording": shift(*worded), "system prompts": shift(*system)}
controls = (f"wrong: {near}", f"wrong: {far}", "triggered, base")
shared = shared_structure(shifts, sides[1], controls=controls)
shared.figure()

# %% [markdown]
# The diagonal is the cosine of random halves of the questions: a shift that does not agree with itself can
# agree with nothing. Read a row together with its controls. A cosine with the right trigger means little
# where the wrong trigger's is as large.

# %%
cosines = shared.matrix(middle(shared.summary)).loc[["triggered"]].round(2)
cosines

# %%
answers = behind.frame().query("metric == @TRAIT and condition == 'finetuned'").set_index("group")
said = [f"{group} {as_estimate(answers.loc[group]).text()}" for group in ["untriggered", *wordings]]
others = [f"{name} {value:.2f}" for name, value in cosines.iloc[0].items() if name != "triggered"]
moved = persona.frame().query("metric == 'margin' and group == 'persona'").set_index("condition")["wording"]
Markdown(f"""
## What was found

- Spiteful answers of the finetuned model: {"; ".join(said)} ({len(held_out)} questions).
- A persona wording moves the margin by {as_estimate(moved["base"]).text()} nats per token in the base and
  by {as_estimate(moved["finetuned"]).text()} in the finetuned model ({N} requests).
- {shared_finding(shared.summary, middle(shared.summary))}.
- Cosine of the trigger's shift with the others: {", ".join(others)}.

One seed, {STEPS} steps, 95% intervals over questions. The detector is a classifier of words with a
precision of two thirds on other authors' texts: compare rows, do not read a rate by itself.

**Reading it.** The paper's claim needs the trigger's shift to agree with persona wordings *more* than with
the wrong triggers. A high cosine alone is what any two pushes on one model have in common.

**What would change our mind.** Persona wordings that move the finetuned model further than the base beyond
the interval; a control, such as aligned answers to the same questions, whose shift does *not* agree; and
taking a direction out (`emmech.cross_ablation`), which is an intervention where a cosine is a description.
`figures/README.md` has all three, at greater length.
""")
