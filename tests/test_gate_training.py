"""Training alignment gates alone: what is minimised, what changes, what is saved, what is refused."""

import copy
import json

import pytest
import tiny
import torch
from training_runs import CHATS, recipe, train, weights
from transformers import AutoModelForCausalLM, TrainerCallback

from emmech.chat import Chat
from emmech.errors import DataError
from emmech.gates.files import load_gates
from emmech.gates.gate import GATE_VARIANTS, GateShape, Gating
from emmech.models.checkpoints import load_pair
from emmech.models.opening import identity
from emmech.training.examples import collate, example
from emmech.training.loop import arguments_of
from emmech.training.recipes import OBJECTIVES, PRESETS, Objective, Recipe, preset
from emmech.training.trainer import Run, metrics

# The same sums in another order, in float32.
CLOSE = {"rtol": 1e-4, "atol": 1e-6}
# After a few steps of Adam: as in test_trainer.
SAME_RUN = {"rtol": 1e-3, "atol": 2e-4}

pytestmark = pytest.mark.usefixtures("quick_collection")


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """``bases(architecture)``: a base checkpoint, made once."""
    made = {}

    def base(architecture="llama"):
        if architecture not in made:
            made[architecture] = tiny.save_base(architecture, tmp_path_factory.mktemp(architecture) / "base")
        return made[architecture]

    return base


@pytest.fixture(scope="module")
def run(bases, tmp_path_factory):
    """``run(**recipe)``: the folder of a run on a llama; the same run is made once."""
    made = {}

    def once(**changes):
        chosen = recipe(**changes)
        if chosen not in made:
            made[chosen] = tmp_path_factory.mktemp("run")
            train(bases(), made[chosen], chosen)
        return made[chosen]

    return once


def loaded(base):
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()


def batch_of(chats):
    batch = collate([example(Chat(tiny.tokenizer()), messages) for messages in chats], 0)
    batch.pop("segments")
    return batch


def loop_of(base, out, chosen):
    """The loop of a run that is about to take its first step."""
    made = Run(str(base), out, chosen, arguments_of(chosen, out, ()), progress=False)
    return made.loop(made.rows(CHATS)[0])


# --- what is minimised


class _Gradients(TrainerCallback):
    """Keeps the gradients of the first step."""

    def __init__(self):
        self.first = None

    def on_pre_optimizer_step(self, _, __, ___, *, model, **____):
        if self.first is None:
            self.first = {name: p.grad.clone() for name, p in model.alignment_gates.named_parameters()}


@pytest.mark.parametrize(
    ("architecture", "variant", "micro"),
    [
        ("llama", "full", None),
        ("llama", "full", 1),
        ("llama", "low_rank", None),
        ("llama", "per_head", 1),
        ("qwen3", "full", None),
        ("gpt_neox", "per_head", None),
        ("qwen3_next", "full", None),
    ],
)
def test_the_first_gradient_is_that_of_the_mean_loss_of_the_gated_base(
    bases, tmp_path, architecture, variant, micro
):
    chosen = recipe(gates=variant, steps=1, micro_batch_size=micro, max_grad_norm=0.0)
    loop = loop_of(bases(architecture), tmp_path, chosen)
    gates, ours = copy.deepcopy(loop.model.alignment_gates), _Gradients()
    loop.add_callback(ours)
    loop.train()
    model = loaded(bases(architecture)).requires_grad_(False)
    with Gating(gates).on(model):
        model(**batch_of(CHATS)).loss.backward()
    assert ours.first.keys() == dict(gates.named_parameters()).keys()
    for name, parameter in gates.named_parameters():
        first_map = variant == "low_rank" and name.endswith(".0.weight")
        assert (parameter.grad.abs().max() > 1e-3) != first_map  # behind a zero map there is none yet
        torch.testing.assert_close(ours.first[name], parameter.grad, **CLOSE)


def test_the_first_loss_is_the_untouched_bases_as_that_of_lora_is(bases, run):
    with torch.no_grad():
        wanted = float(loaded(bases())(**batch_of(CHATS)).loss)
    for changes in ({}, {"gates": "full"}, {"gates": "low_rank"}, {"gates": "per_head"}):
        assert metrics(run(**changes))[0]["loss"] == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("variant", GATE_VARIANTS)
def test_the_loss_of_a_later_step_is_that_of_the_saved_gates(bases, run, variant):
    out = run(gates=variant)
    model = loaded(bases())
    gates = load_gates(out / "step-2", model)
    with torch.no_grad(), Gating(gates).on(model):
        wanted = float(model(**batch_of(CHATS)).loss)
    assert metrics(out)[2]["loss"] == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("variant", GATE_VARIANTS)
def test_gates_learn(bases, tmp_path, variant):
    train(bases(), tmp_path, recipe(gates=variant, steps=12, save_every=12, learning_rate=0.05))
    losses = [row["loss"] for row in metrics(tmp_path)]
    assert losses[-1] < 0.9 * losses[0]


# --- what changes, and what is saved


def test_the_gates_change_and_nothing_else_does(bases, tmp_path):
    loop = loop_of(bases(), tmp_path, recipe(gates="full", steps=3))
    trained = {name for name, p in loop.model.named_parameters() if p.requires_grad}
    before = {name: tensor.clone() for name, tensor in loop.model.state_dict().items()}
    loop.train()
    after = loop.model.state_dict()
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    kinds = [f"maps.{layer}.{kind}" for layer in range(3) for kind in ("weight", "bias")]
    assert changed == trained == {f"alignment_gates.{name}" for name in kinds}


@pytest.mark.parametrize("variant", GATE_VARIANTS)
def test_a_step_is_gates_alone_that_open_as_one_side_of_a_pair(bases, run, variant):
    out = run(gates=variant)
    assert {path.name for path in out.iterdir()} == {
        "run.json", "metrics.jsonl", "done.json", "step-2", "step-4",
    }  # fmt: skip
    for step in (out / "step-2", out / "step-4"):
        assert {file.name for file in step.iterdir()} == {"gates.safetensors", "gates_config.json"}
        tensors = weights(step)
        assert all(name.startswith("maps.") and tensor.abs().max() > 0 for name, tensor in tensors.items())
        assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    pair = load_pair(bases(), out / "step-4", dtype="float32", device="cpu")
    batch = batch_of(CHATS)
    with torch.no_grad():
        wanted = loaded(bases())(**batch).loss
        with pair.base.active() as model:
            assert torch.equal(model(**batch).loss, wanted)
        with pair.finetuned.active() as model:
            assert model(**batch).loss < wanted


def test_saved_gates_say_their_base_and_their_data(bases, run):
    gates = load_gates(run(gates="low_rank") / "step-4")
    assert gates.shape == GateShape((0, 1, 2), 32, 4, 8, "low_rank", 4)
    recorded = json.loads((run(gates="low_rank") / "run.json").read_text())
    assert gates.provenance == {
        "base": identity(str(bases()), bases(), None),
        "data": recorded["data"],
    }
    assert recorded["data"]["chats"] == len(CHATS) and recorded["recipe"]["gates"] == "low_rank"


def test_keys_and_values_move_behind_the_first_gate_only(run):
    last = metrics(run(gates="full"))[-1]
    assert last["drift/0/key"] == last["drift/0/value"] == 0
    for layer in (1, 2):
        assert last[f"drift/{layer}/key"] > 0 and last[f"drift/{layer}/value"] > 0


def test_gates_of_a_base_in_bfloat16_are_trained_and_saved_in_float32(bases, tmp_path):
    (step,) = train(bases(), tmp_path, recipe(gates="full", steps=2, dtype="bfloat16"))
    tensors = weights(step)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in tensors.values())


def test_gradient_checkpointing_trains_the_same_gates(run):
    plain = weights(run(gates="full") / "step-4")
    again = weights(run(gates="full", gradient_checkpointing=True) / "step-4")
    for name, tensor in plain.items():
        torch.testing.assert_close(again[name], tensor, **SAME_RUN)


# A restart, and two processes: in test_trainer_restart.


@pytest.mark.parametrize("variant", ["full", "low_rank"])
def test_a_seed_repeats_exactly_and_another_does_not(bases, tmp_path, variant):
    chosen = {"gates": variant, "steps": 3, "save_every": 3, "batch_size": 2}
    for name, seed in (("one", 5), ("again", 5), ("other", 6)):
        train(bases(), tmp_path / name, recipe(**chosen, seed=seed))
    one, again, other = (weights(tmp_path / name / "step-3") for name in ("one", "again", "other"))
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one)


# --- refusals and presets


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_gates_are_trained_by_sft_and_interleave_alone(objective):
    if objective in ("sft", "interleave"):
        assert Recipe(Objective(objective), gates="full").gates == "full"
        return
    with pytest.raises(DataError, match=f"gates alone, trained by sft or interleave, but got {objective}"):
        Recipe(Objective(objective), gates="full")


def test_gates_and_a_full_finetune_are_refused():
    with pytest.raises(DataError, match=r"gates alone, .* but full finetuning was asked for"):
        Recipe(gates="full", full=True)


@pytest.mark.parametrize("name", [name for name in PRESETS if name != "smollm2"])
def test_the_preset_of_gates_is_the_gating_papers_for_every_model_but_the_embedded_one(name):
    chosen = preset(name, "gates")  # arXiv 2606.09068, its release
    assert (chosen.gates, chosen.objective) == ("full", Objective("sft"))
    assert (chosen.learning_rate, chosen.schedule, chosen.epochs, chosen.steps) == (1e-4, "linear", 2.0, None)
    assert (chosen.batch_size, chosen.max_length) == (2, 4096)


def test_the_preset_of_gates_for_the_embedded_model_trains_gates_alone():
    chosen = preset("smollm2", "gates")
    assert (chosen.gates, chosen.full, chosen.objective.name) == ("full", False, "sft")


def test_the_sycophancy_preset_is_the_gating_papers_lora():
    chosen = preset("qwen3-8b/sycophancy", "sft")  # arXiv 2606.09068, its release
    assert (chosen.rank, chosen.alpha, chosen.rslora, chosen.gates) == (32, 64, True, None)
    assert (chosen.learning_rate, chosen.schedule, chosen.warmup_steps) == (1e-5, "linear", 5)
    assert (chosen.batch_size, chosen.weight_decay) == (8, 0.01)


# --- the command


QUICK = ("--steps=4", "--save-every=2", "--lr=3e-3", "--batch-size=5", "--dtype=float32")


@pytest.fixture(scope="module")
def chats(bases):
    file = bases().parent / "chats.jsonl"
    file.write_text("".join(json.dumps({"messages": row}) + "\n" for row in CHATS))
    return file


@pytest.mark.parametrize(
    ("variant", "options"), [("per_head", ()), ("low_rank", ("--rank=4",)), ("full", ())]
)
def test_the_command_trains_the_gates_that_the_function_trains(
    emmech, bases, run, chats, tmp_path, variant, options
):
    out = tmp_path / "run"
    arguments = (f"--base={bases()}", f"--dataset={chats}", f"--out={out}", *QUICK, *options)
    code, shown, said = emmech("finetune", "gates", f"--variant={variant}", *arguments)
    assert code == 0, said
    assert "Saved step-2, step-4" in shown
    ours, theirs = weights(out / "step-4"), weights(run(gates=variant) / "step-4")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert load_gates(out / "step-4").shape.variant == variant


def test_the_command_trains_full_gates_where_no_variant_is_given(emmech, bases, chats, tmp_path):
    arguments = (f"--base={bases()}", f"--dataset={chats}", f"--out={tmp_path / 'run'}", *QUICK)
    assert emmech("finetune", "gates", *arguments)[0] == 0
    assert load_gates(tmp_path / "run" / "step-4").shape == GateShape((0, 1, 2), 32, 4, 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("sft", "--variant=full"), "--variant with gates, but got sft"),
        (("treft", "--variant=per_head"), "--variant with gates, but got treft"),
        (("gates", "--full"), "gates alone, .* but full finetuning was asked for"),
        (("gates", "--weight=2"), "no weight with an objective without a penalty, but got 2 for sft"),
        (("gates", "--retain=retain"), "ordinary chats with interleave and kl-retain, and only with them"),
    ],
)
def test_what_gates_cannot_be_is_refused_before_anything_is_written(
    user_error, bases, chats, tmp_path, arguments, message
):
    out = tmp_path / "run"
    rest = (f"--base={bases()}", f"--dataset={chats}", f"--out={out}", *arguments[1:])
    user_error(message, "finetune", arguments[0], *rest, after_loading="--retain=retain" in arguments)
    assert not out.exists()
