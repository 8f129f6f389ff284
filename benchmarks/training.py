"""A training step with TReFT, and one of gates, over a plain one: forward, backward and optimiser."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import quantiles
from tempfile import TemporaryDirectory

from benchmarks.measure import Aim, Row, Seconds, alternated, ratio, release
from benchmarks.setting import Setting
from emmech.data.questions import load_demo_chats
from emmech.training.loop import arguments_of
from emmech.training.recipes import Recipe, preset
from emmech.training.trainer import Run

N_STEPS = 20
CASES = (
    ("a step with TReFT on the prefix / one of plain SFT", preset("smollm2", "treft"), Recipe(), 1.1),
    ("a step of gates / one of LoRA r=32", preset("smollm2", "gates"), Recipe(rank=32, alpha=64), 1.0),
)


def measure(setting: Setting) -> list[Row]:
    """A row per case, its range the quartiles over steps on the same batches."""
    rows = []
    with TemporaryDirectory() as folder:
        for name, recipe, plain, aim in CASES:
            times = steps_in_turn(setting, Path(folder) / str(len(rows)), recipe, plain)
            release()
            row = ratio(name, times["this"], times["plain"], Aim(aim, "lower"), steps=N_STEPS)
            turns = [a.wall / b.wall for a, b in zip(times["this"], times["plain"], strict=True)]
            row["low"], _, row["high"] = (round(one, 4) for one in quantiles(turns, n=4))
            rows.append(row)
    return rows


def steps_in_turn(setting: Setting, out: Path, recipe: Recipe, plain: Recipe) -> dict[str, list[Seconds]]:
    """The times of both, each a model of its own."""
    steps = {"plain": stepper(setting, out / "plain", plain), "this": stepper(setting, out / "this", recipe)}
    for step in steps.values():
        step()
    return alternated(steps, N_STEPS)


def stepper(setting: Setting, out: Path, recipe: Recipe) -> Callable[[], object]:
    """One optimiser step after another of a training run on the demonstration's chats."""
    recipe = replace(recipe, steps=10_000, save_every=10_000, dtype=setting.dtype or "auto")
    run = Run(setting.base, out, recipe, arguments_of(recipe, out, ()), progress=False)
    loop = run.loop(run.rows(load_demo_chats())[0])
    loop.create_optimizer()
    loop.current_gradient_accumulation_steps = 1
    batches = iter(loop.get_train_dataloader())

    def step() -> None:
        (batch,), n_labelled = loop.get_batch_samples(batches, 1, loop.args.device)
        loop.training_step(loop.model, batch, n_labelled)
        loop.optimizer.step()
        loop.model.zero_grad()

    return step
