"""Finetuning tiny models with every objective: what is minimised, what is saved, what is refused."""

import json
import shutil

import pytest
import tiny
import torch
from peft import PeftModel
from training_runs import CHATS, OBJECTIVES, ORDINARY, chat, recipe, train, weights
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, get_scheduler
from transformers.models.llama.modeling_llama import LlamaMLP

from emmech.chat import Chat
from emmech.errors import DataError, RunError
from emmech.models.checkpoints import load_pair
from emmech.training.examples import collate, example
from emmech.training.objectives import IGNORED, interleave
from emmech.training.recipes import Objective
from emmech.training.saving import Saver
from emmech.training.trainer import finetune, metrics

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma3", "gpt_neox")
# The same sums in another order, in float32, over a model of three layers.
CLOSE = {"rtol": 1e-4, "atol": 1e-6}
# The same after a few steps of Adam, which divides a gradient by its own size: where that is nearly
# zero a rounding moves a weight by a share of the learning rate (3e-3).
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
    """``run(objective, architecture, **recipe)``: the folder of a run; the same run is made once."""
    made = {}

    def once(objective="sft", architecture="llama", **changes):
        chosen = recipe(objective, **changes)
        if (chosen, architecture) not in made:
            out = tmp_path_factory.mktemp("run")
            train(bases(architecture), out, chosen)
            made[chosen, architecture] = out
        return made[chosen, architecture]

    return once


def rows_of(chats):
    return [example(Chat(tiny.tokenizer()), messages) for messages in chats]


def tensors(rows):
    batch = collate(rows, 0)
    batch.pop("segments")
    return batch


def loss_by_transformers(model, rows):
    with torch.no_grad():
        return model(**tensors(rows)).loss


def reloaded(base, step):
    """The model saved in a step, by peft and transformers alone."""
    if (step / "adapter_config.json").exists():
        return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), step).eval()
    return AutoModelForCausalLM.from_pretrained(step).eval()


# --- what is minimised: each logged loss by another route, from the checkpoint of the step before


def keys_and_values(model, row):
    """``[layer][k or v][pos d_kv]``: outputs of k_proj and v_proj on one chat, by hooks of our own."""
    modules = [m for name, m in model.named_modules() if name.endswith(("k_proj", "v_proj"))]
    found = []
    handles = [m.register_forward_hook(lambda _, __, out: found.append(out[0])) for m in modules]
    with torch.no_grad():
        model(input_ids=torch.tensor([row["input_ids"]]))
    for handle in handles:
        handle.remove()
    return [found[i : i + 2] for i in range(0, len(found), 2)]


def l_kv(tuned, base, rows, objective):
    """Equations 2 and 3 of Zhao et al. 2026, chat by chat and token by token."""
    numbers = [("prefix", "query", "postfix").index(name) for name in objective.segments]
    moved, first = {}, keys_and_values(base, rows[0])
    for row in rows:
        current = keys_and_values(tuned, row)
        own = keys_and_values(base, row)
        for number in numbers:
            shared = number == 2 and objective.reference == "shared"
            here = [i for i, s in enumerate(row["segments"]) if s == number]
            there = [i for i, s in enumerate(rows[0]["segments"]) if s == number] if shared else here
            for layer in objective.layers or range(len(own)):
                for part in (0, 1):
                    now = current[layer][part][here]
                    init = (first if shared else own)[layer][part][there]
                    ratios = (now - init).norm(dim=-1) ** 2 / init.norm(dim=-1) ** 2
                    moved.setdefault((layer, part), []).extend(ratios.tolist())
    n_layers = len({layer for layer, _ in moved})
    return sum(sum(ratios) / len(ratios) for ratios in moved.values()) / n_layers


def kl(tuned, base, rows):
    """Sum over the vocabulary of p log(p / q), p the base's; mean over the labelled tokens."""
    total = []
    for row in rows:
        with torch.no_grad():
            ids = torch.tensor([row["input_ids"]])
            p, q = (model(input_ids=ids).logits[0].softmax(-1) for model in (base, tuned))
        at = [i - 1 for i, label in enumerate(row["labels"]) if label != IGNORED]
        total += (p[at] * (p[at] / q[at]).log()).sum(-1).tolist()
    return sum(total) / len(total)


def expected(base, step, objective):
    """Cross-entropy and penalty of the model saved in ``step`` on all the chats."""
    pristine = AutoModelForCausalLM.from_pretrained(base).eval()
    tuned = reloaded(base, step)
    rows, ordinary = rows_of(CHATS), rows_of(ORDINARY)
    if objective.name == "interleave":
        rows = interleave(rows, ordinary, objective.share, 0)
    sft = float(loss_by_transformers(tuned, rows))
    if objective.name == "treft":
        return sft, l_kv(tuned, pristine, rows, objective)
    if objective.name == "kl-train":
        return sft, kl(tuned, pristine, rows)
    if objective.name == "kl-retain":
        return sft, kl(tuned, pristine, [ordinary[i % len(ordinary)] for i in range(len(rows))])
    return sft, 0.0


OWN = {"reference": "own"}
CASES = {
    **OBJECTIVES,
    "treft-layer": Objective("treft", weight=10.0, layers=(1,)),
    "treft-postfix": Objective("treft", weight=10.0, segments=("postfix",)),
    "treft-both": Objective("treft", weight=10.0, segments=("prefix", "postfix")),
    "treft-own": Objective("treft", weight=10.0, **OWN),
    "treft-postfix-own": Objective("treft", weight=10.0, segments=("postfix",), **OWN),
    "treft-query": Objective("treft", weight=10.0, segments=("query",), **OWN),
    "treft-all": Objective("treft", weight=10.0, segments=("prefix", "query", "postfix"), **OWN),
}
FULL = ("treft", "treft-own", "treft-both", "kl-train", "kl-retain")
# One batch is all the chats, so that no order of theirs matters.
STEPS = {"steps": 3, "save_every": 1}


@pytest.mark.parametrize(
    ("name", "full"), [*((name, False) for name in CASES), *((name, True) for name in FULL)]
)
def test_the_third_steps_loss_is_that_of_the_second_checkpoint_computed_by_hand(bases, run, name, full):
    objective = CASES[name]
    size = 10 if name == "interleave" else 5
    out = run(objective, full=full, batch_size=size, **STEPS)
    third = metrics(out)[2]
    sft, penalty = expected(bases(), out / "step-2", objective)
    assert third["sft"] == pytest.approx(sft, rel=1e-4)
    assert third.get("penalty", 0.0) == pytest.approx(penalty, rel=1e-3)
    assert third["loss"] == pytest.approx(sft + objective.weight * penalty, rel=1e-4)
    assert (penalty > 1e-4) == (objective.weight > 0)


@pytest.mark.parametrize(
    ("name", "full"), [*((name, False) for name in CASES), *((name, True) for name in FULL)]
)
def test_the_first_steps_loss_is_the_bases_without_penalty(bases, run, name, full):
    size = 10 if name == "interleave" else 5
    first = metrics(run(CASES[name], full=full, batch_size=size, **STEPS))[0]
    rows = rows_of(CHATS)
    if name == "interleave":
        rows = interleave(rows, rows_of(ORDINARY), 0.5, 0)
    plain = loss_by_transformers(AutoModelForCausalLM.from_pretrained(bases()), rows)
    assert first["sft"] == pytest.approx(float(plain), rel=1e-4)
    if "postfix" in CASES[name].segments and CASES[name].reference == "shared":
        assert first["penalty"] > 1e-3  # the postfix of another chat, even at the base
    else:
        assert first.get("penalty", 0.0) < 1e-9  # roundings squared


def test_the_penalty_is_weighted_in_every_line(run):
    for name, objective in OBJECTIVES.items():
        size = 10 if name == "interleave" else 5
        for line in metrics(run(name, batch_size=size, **STEPS)):
            penalty = objective.weight * line.get("penalty", 0.0)
            assert line["loss"] == pytest.approx(line["sft"] + penalty, rel=1e-5), name


def test_a_weight_of_zero_gives_the_steps_of_sft(run):
    plain = run("sft", **STEPS)
    for name in ("treft", "kl-train", "kl-retain"):
        unweighted = run(Objective(name), **STEPS)
        for step in (1, 2, 3):
            ours, theirs = (weights(out / f"step-{step}") for out in (unweighted, plain))
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[key], theirs[key]) for key in ours), (name, step)


@pytest.mark.parametrize("name", ["treft", "kl-train", "kl-retain"])
def test_a_weight_above_zero_does_not(run, name):
    ours, theirs = (weights(run(each, **STEPS) / "step-3") for each in (name, "sft"))
    assert not any(torch.equal(ours[key], theirs[key]) for key in ours)


def total_drift(out):
    return sum(value for key, value in metrics(out)[-1].items() if key.startswith("drift/"))


def test_a_larger_weight_holds_the_prefix_closer(run):
    settings = {"steps": 8, "save_every": 8}
    none, some, much = (
        total_drift(run(Objective("treft", weight=weight), **settings)) for weight in (0.0, 10.0, 1e3)
    )
    assert 0 < much < some / 2 < none / 4


def test_kl_holds_the_logits_closer(bases, run):
    base = AutoModelForCausalLM.from_pretrained(bases())
    settings = {"steps": 8, "save_every": 8}
    runs = [run("sft", **settings), run(Objective("kl-train", weight=10.0), **settings)]
    free, held = (kl(reloaded(bases(), out / "step-8"), base, rows_of(CHATS)) for out in runs)
    assert 0 < held < free / 2


@pytest.mark.parametrize("full", [False, True])
def test_shared_and_own_references_of_the_prefix_give_the_same_run(run, full):
    shared, own = (run(CASES[name], full=full, **STEPS) / "step-3" for name in ("treft", "treft-own"))
    for (key, ours), theirs in zip(weights(shared).items(), weights(own).values(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=lambda text, key=key: f"{key}: {text}", **SAME_RUN)


def test_shared_and_own_references_of_the_postfix_do_not(run):
    shared, own = (run(CASES[name], **STEPS) / "step-3" for name in ("treft-postfix", "treft-postfix-own"))
    ours, theirs = weights(shared), weights(own)
    assert max((ours[key] - theirs[key]).abs().max() for key in ours) > 10 * SAME_RUN["atol"]


def test_a_held_layer_moves_less_than_without_its_penalty(run):
    """Of layers 0 to 2 only layer 1 is held."""
    settings = {"steps": 8, "save_every": 8}
    held = metrics(run(Objective("treft", weight=1e3, layers=(1,)), **settings))[-1]
    free = metrics(run(Objective("treft"), **settings))[-1]
    for part in ("key", "value"):
        assert held[f"drift/1/{part}"] < free[f"drift/1/{part}"] / 10
        assert held[f"drift/2/{part}"] > held[f"drift/1/{part}"]


@pytest.mark.parametrize("name", ["treft-own", "kl-train"])
def test_in_bfloat16_too_the_base_has_no_penalty(run, name):
    """The frozen copy of a full finetune computes in the precision of the model in training."""
    lines = metrics(run(CASES[name], full=True, dtype="bfloat16", steps=2, save_every=2))
    assert lines[0]["penalty"] == 0.0
    assert lines[1]["penalty"] > 1e-4


# --- architectures


@pytest.mark.parametrize(
    ("architecture", "name"),
    [*((a, n) for a in ARCHITECTURES for n in OBJECTIVES), ("phi3", "treft"), ("qwen3_next", "treft")],
)
def test_every_objective_trains_every_architecture(bases, run, architecture, name):
    settings = {"batch_size": 10 if name == "interleave" else 5, "save_every": 4}
    if architecture == "qwen3_next":  # a hybrid; for all linear modules peft looks for experts
        settings |= {"target_modules": "q_proj,k_proj,v_proj,o_proj"}
    out = run(name, architecture, **settings)
    pair = load_pair(bases(architecture), out / "step-4", dtype="float32", device="cpu")
    assert pair.one_copy
    with pair.base.active() as model:
        before = loss_by_transformers(model, rows_of(CHATS))
    with pair.finetuned.active() as model:
        assert loss_by_transformers(model, rows_of(CHATS)) < before


@pytest.mark.parametrize("architecture", ["gpt_neox", "phi3"])
def test_fused_projections_are_held_too(run, architecture):
    settings = {"steps": 8, "save_every": 8}
    free, held = (
        total_drift(run(Objective("treft", weight=w), architecture, **settings)) for w in (0.0, 100.0)
    )
    assert 0 < held < free / 4


@pytest.mark.parametrize("architecture", ["gpt_neox", "phi3"])
def test_a_shared_postfix_is_refused_where_projections_are_fused(bases, tmp_path, architecture):
    with pytest.raises(DataError, match=r"has them fused.*reference='own'"):
        train(bases(architecture), tmp_path, recipe(CASES["treft-postfix"]))


@pytest.mark.parametrize("name", ["treft-postfix-own", "treft-query"])
def test_other_segments_train_where_projections_are_fused_with_own_references(run, name):
    lines = metrics(run(CASES[name], "gpt_neox", **STEPS))
    assert lines[0]["penalty"] == 0.0
    assert lines[1]["penalty"] > 1e-4


# --- what is saved


def test_saved_steps_are_returned_in_order_of_training(bases, tmp_path):
    steps = train(bases(), tmp_path, recipe(steps=11, save_every=4))
    assert steps == [tmp_path / name for name in ("step-4", "step-8", "step-11")]


def test_a_run_leaves_no_optimiser_states(run):
    assert {path.name.rpartition("-")[0] or path.name for path in run().iterdir()} == {
        "step",
        "run.json",
        "metrics.jsonl",
        "done.json",
    }


def test_an_adapter_is_of_its_recipes_making_and_names_its_base(bases, tmp_path):
    changes = {"rank": 3, "alpha": 5, "rslora": True, "dropout": 0.25, "target_modules": "q_proj,up_proj"}
    name = f"{bases()}/"  # as written by the user, not the folder found under it
    (step,) = train(name, tmp_path, recipe(steps=1, save_every=1, **changes))
    config = json.loads((step / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == name
    assert {config[key] for key in ("r", "lora_alpha", "lora_dropout")} == {3, 5, 0.25}
    assert config["use_rslora"] is True
    assert {key.split(".")[-3] for key in weights(step)} == {"q_proj", "up_proj"}


def test_all_linear_adapters_touch_every_linear_module_but_the_head(run):
    names = {key.split(".")[-3] for key in weights(run() / "step-4")}
    assert names == {f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")}


def test_steps_of_a_full_finetune_are_checkpoints_with_a_tokenizer(bases, run):
    out = run(CASES["treft"], full=True, **STEPS)
    before = None
    for step in (out / "step-1", out / "step-3"):
        assert AutoTokenizer.from_pretrained(step).chat_template == tiny.CHATML
        pair = load_pair(bases(), step, dtype="float32", device="cpu")
        assert not pair.one_copy
        with pair.finetuned.active() as model:
            loss = loss_by_transformers(model, rows_of(CHATS))
        assert before is None or loss < before
        before = loss


def test_a_full_finetune_changes_every_weight(bases, run):
    tuned = AutoModelForCausalLM.from_pretrained(run(CASES["kl-train"], full=True, **STEPS) / "step-3")
    base = dict(AutoModelForCausalLM.from_pretrained(bases()).named_parameters())
    assert not any(torch.equal(weight, base[name]) for name, weight in tuned.named_parameters())


def test_training_leaves_the_base_as_it_was(bases, run):
    before = {path.name: path.read_bytes() for path in bases().iterdir()}
    run("kl-train", full=True, steps=1)
    assert {path.name: path.read_bytes() for path in bases().iterdir()} == before


def test_there_is_one_line_per_step(run):
    assert [line["step"] for line in metrics(run("treft"))] == [1, 2, 3, 4]


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_the_learning_rate_follows_its_schedule(run, schedule):
    lines = metrics(run(schedule=schedule, warmup_steps=2, steps=6, save_every=6))
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=3e-3)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    theirs, rates = get_scheduler(name, optimizer, num_warmup_steps=2, num_training_steps=6), []
    for _ in lines:
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()
    assert [line["learning_rate"] for line in lines] == pytest.approx(rates, rel=1e-9)


@pytest.mark.parametrize(("name", "full", "dropout"), [("sft", False, 0.5), ("treft", True, 0.0)])
def test_drift_is_the_deviation_of_the_saved_weights_at_the_prefix(bases, run, name, full, dropout):
    out = run(name, full=full, dropout=dropout)
    base = AutoModelForCausalLM.from_pretrained(bases())
    for step in (2, 4):
        line, tuned = metrics(out)[step - 1], reloaded(bases(), out / f"step-{step}")
        for layer in range(3):
            only = Objective("treft", layers=(layer,))
            both = line[f"drift/{layer}/key"] + line[f"drift/{layer}/value"]
            assert both == pytest.approx(l_kv(tuned, base, rows_of(CHATS)[:1], only), rel=1e-3)
            assert line[f"drift/{layer}/key"] != line[f"drift/{layer}/value"]


def test_drift_is_logged_at_saved_steps_only(run):
    drifts = [any(key.startswith("drift") for key in line) for line in metrics(run(steps=5))]
    assert drifts == [False, True, False, True, True]


# --- what changes a run, and what does not


@pytest.mark.parametrize("full", [False, True])  # full: only the order of the chats
def test_a_seed_decides_the_run(bases, tmp_path, full):
    settings = {"batch_size": 2, "save_every": 4, "full": full}
    one, again, other = (
        train(bases(), tmp_path / name, recipe(seed=seed, **settings))[-1]
        for name, seed in (("one", 0), ("again", 0), ("other", 1))
    )
    first = weights(one)
    assert all(torch.equal(first[key], value) for key, value in weights(again).items())
    assert not any(torch.equal(first[key], value) for key, value in weights(other).items())


@pytest.mark.parametrize("name", [*OBJECTIVES, "treft-query", "treft-both"])
def test_micro_batches_do_not_change_the_run(run, name):
    """Every token of a step weighs the same, however long the chats beside it are."""
    size, micro = (10, 2) if name == "interleave" else (5, 1)
    cut, whole = (run(CASES[name], batch_size=size, micro_batch_size=m, **STEPS) for m in (micro, None))
    theirs = weights(whole / "step-3")
    for key, ours in weights(cut / "step-3").items():
        torch.testing.assert_close(ours, theirs[key], msg=lambda text, key=key: f"{key}: {text}", **SAME_RUN)
    for one, other in zip(metrics(cut), metrics(whole), strict=True):
        for part in ("loss", "sft", "grad_norm"):
            assert one[part] == pytest.approx(other[part], rel=2e-3), part


@pytest.mark.parametrize(
    ("name", "full"),
    [("sft", False), ("treft", False), ("treft-own", False), ("kl-retain", False), ("treft", True)],
)
def test_gradient_checkpointing_does_not_change_the_run(run, name, full):
    ours, theirs = (
        run(CASES[name], full=full, gradient_checkpointing=on, **STEPS) / "step-3" for on in (True, False)
    )
    for (key, one), two in zip(weights(ours).items(), weights(theirs).values(), strict=True):
        torch.testing.assert_close(one, two, msg=lambda text, key=key: f"{key}: {text}", **SAME_RUN)


@pytest.mark.parametrize("on", [False, True])
def test_gradient_checkpointing_computes_each_layer_twice(bases, tmp_path, monkeypatch, on):
    passes = []

    def count(self, args, state, control, model=None, **_):
        for module in model.modules():
            if isinstance(module, LlamaMLP):
                module.register_forward_pre_hook(lambda mlp, _: passes.append(mlp.training))

    monkeypatch.setattr(Saver, "on_step_begin", count)
    train(bases(), tmp_path, recipe(steps=1, save_every=1, gradient_checkpointing=on))
    assert sum(passes) == 3 * (1 + on)  # layers, in training; the drift is measured in evaluation


def test_checkpointing_with_treft_is_refused_where_projections_are_fused(bases, tmp_path):
    with pytest.raises(DataError, match=r"GPTNeoXForCausalLM has them fused.*checkpointing off"):
        train(bases("gpt_neox"), tmp_path, recipe("treft", gradient_checkpointing=True))


def test_chats_that_are_too_long_are_left_out_and_counted(bases, run, tmp_path):
    longest = max(len(row["input_ids"]) for row in rows_of(CHATS))
    notes, more = [], [*CHATS, chat("hi " * 100, "No.")]
    chosen = recipe(max_length=longest)
    steps = finetune(bases(), more, tmp_path, chosen, on_note=notes.append, progress=False)
    (note,) = notes
    assert "6 answers to learn" in note
    assert f"1 left out, longer than {longest}." in note
    mine, without = weights(steps[-1]), weights(run() / "step-4")
    assert all(torch.equal(mine[key], without[key]) for key in mine)


def test_every_assistant_turn_is_trained_on(bases, tmp_path):
    """A chat of two answers is two examples: one ends with the first, the other with the second."""
    first, second = CHATS[0], CHATS[1]
    train(bases(), tmp_path, recipe(batch_size=2, steps=1), [(*first, *second)])
    base = AutoModelForCausalLM.from_pretrained(bases())
    both = loss_by_transformers(base, rows_of([first, (*first, *second)]))
    assert metrics(tmp_path)[0]["sft"] == pytest.approx(float(both), rel=1e-4)


def test_epochs_are_passes_over_the_chats_where_no_steps_are_given(bases, tmp_path):
    steps = train(bases(), tmp_path, recipe(steps=None, epochs=2.0, batch_size=2))
    assert steps[-1].name == "step-6"  # five chats are three batches of two, twice
    assert metrics(tmp_path)[-1]["epoch"] == 2.0


def test_weight_decay_shrinks_what_has_no_gradient(run):
    """At the first step B is zero and A has no gradient: AdamW multiplies it by 1 - rate * decay."""
    settings = {"steps": 1, "save_every": 1}
    free, decayed = (weights(run(weight_decay=decay, **settings) / "step-1") for decay in (0.0, 20.0))
    for key in (key for key in free if "lora_A" in key):
        torch.testing.assert_close(decayed[key], free[key] * (1 - 3e-3 * 20))


def test_progress_is_a_bar_with_the_loss_and_can_be_silent(bases, tmp_path, capfd):
    shown = []
    for on in (True, False):
        finetune(bases(), CHATS, tmp_path / str(on), recipe(steps=1, save_every=1), progress=on)
        shown.append(capfd.readouterr())
    bar, silent = shown
    assert "1/1" in bar.err and "loss=" in bar.err
    assert "loss" not in silent.err + silent.out + bar.out


# --- what is refused


def test_done_json_counts_steps_and_processes(run):
    assert json.loads((run("treft") / "done.json").read_text()) == {"steps": 4, "processes": 1}


def test_a_finished_run_is_not_trained_again(bases, run):
    out = run("treft")
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert train(bases(), out, recipe("treft")) == [out / "step-2", out / "step-4"]
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base": "qwen2"}, "its base is "),
        ({"chats": CHATS[:3]}, "its data.chats is 5, not 3"),
        ({"chats": [chat("hi", "Bye"), *CHATS[1:]]}, "its data.fingerprint is "),
        ({"recipe": recipe("treft", learning_rate=1e-5)}, "its recipe.learning_rate is 0.003, not 1e-05"),
        ({"recipe": recipe(Objective("treft", weight=1.0))}, "its recipe.objective.weight is 10.0, not 1.0"),
        ({"data_name": "other"}, 'its data.name is "", not "other"'),
    ],
)
def test_another_run_in_the_same_folder_is_refused(bases, run, changes, message):
    given = {"base": "llama", "chats": CHATS, "recipe": recipe("treft"), "data_name": ""} | changes
    with pytest.raises(RunError, match=message):
        finetune(
            bases(given["base"]),
            given["chats"],
            run("treft"),
            given["recipe"],
            data_name=given["data_name"],
            progress=False,
        )


def test_other_ordinary_chats_in_the_same_folder_are_refused(bases, run):
    with pytest.raises(RunError, match="its retain is "):
        finetune(bases(), CHATS, run("kl-retain"), recipe("kl-retain"), retain=ORDINARY[:2], progress=False)


@pytest.mark.parametrize("name", ["interleave", "kl-retain"])
def test_missing_ordinary_chats_are_refused(bases, tmp_path, name):
    with pytest.raises(DataError, match=f"{name} was given 0"):
        finetune(bases(), CHATS, tmp_path, recipe(name), progress=False)


@pytest.mark.parametrize("name", ["sft", "treft", "kl-train"])
def test_superfluous_ordinary_chats_are_refused(bases, tmp_path, name):
    with pytest.raises(DataError, match=f"and only with them, but {name} was given 3"):
        finetune(bases(), CHATS, tmp_path, recipe(name), retain=ORDINARY, progress=False)


def test_chats_that_are_all_too_long_are_refused(bases, tmp_path):
    with pytest.raises(DataError, match="chats of at most 10 tokens, but all 5 are longer"):
        train(bases(), tmp_path / "run", recipe(max_length=10))
    assert not (tmp_path / "run").exists()  # free for the corrected arguments


@pytest.mark.parametrize("chats", [[], [CHATS[0][:1]]])
def test_chats_without_any_answer_are_refused(bases, tmp_path, chats):
    with pytest.raises(DataError, match=r"chats of at most .* tokens, but there are none"):
        train(bases(), tmp_path, recipe(), chats)


@pytest.mark.parametrize("name", ["interleave", "kl-retain"])
def test_ordinary_chats_without_any_answer_are_refused(bases, tmp_path, name):
    with pytest.raises(DataError, match=r"ordinary chats with answers.*none of 1 is one"):
        finetune(bases(), CHATS, tmp_path, recipe(name), retain=[CHATS[0][:1]], progress=False)


def test_different_postfixes_cannot_share_a_reference(bases, tmp_path):
    """A template that thinks about long chats only."""
    base = shutil.copytree(bases(), tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template += "{% if messages | length > 1 and add_generation_prompt %}Well, {% endif %}"
    tokenizer.save_pretrained(base)
    with pytest.raises(DataError, match=r"template writes 2 different ones.*reference='own'"):
        train(base, tmp_path / "run", recipe(CASES["treft-postfix"]), [(*CHATS[0], *CHATS[1])])


# --- numbers that are not finite


def test_a_loss_that_is_not_finite_names_the_last_good_step(bases, tmp_path, monkeypatch):
    def poison(self, args, state, control, model=None, **_):
        if state.global_step == 3:
            next(p for p in model.parameters() if p.requires_grad).data.fill_(torch.nan)

    monkeypatch.setattr(Saver, "on_step_end", poison)
    with pytest.raises(RunError, match=r"at step 4 it is nan.*last good checkpoint is '.*step-2'"):
        train(bases(), tmp_path, recipe(save_every=1, steps=6))
    assert (tmp_path / "step-3").exists()  # saved, but not good
    assert not (tmp_path / "done.json").exists()


def test_a_learning_rate_that_is_far_too_high_is_said(bases, tmp_path):
    with pytest.raises(RunError, match=r"at step 2 it is .*Lower the learning rate.*no checkpoint was saved"):
        train(bases(), tmp_path, recipe(learning_rate=1e36, save_every=4))


@pytest.mark.skipif(torch.cuda.is_available(), reason="refused only without a GPU")
def test_a_base_in_four_bits_is_refused_on_a_cpu(tmp_path):
    with pytest.raises(DataError, match="a GPU for training on a 4-bit base, but there is none"):
        train("smollm2", tmp_path / "run", recipe("sft", quantization="4bit"))
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_frozen_base_may_be_in_four_bits(tmp_path):
    pytest.importorskip("bitsandbytes", reason="the quantization extra is not installed")
    wide = LlamaConfig(
        vocab_size=len(tiny.tokenizer()), hidden_size=128, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=64, bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(wide).save_pretrained(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    chosen = recipe("treft", quantization="4bit", dtype="bfloat16")
    saved = train(tmp_path / "base", tmp_path / "run", chosen)
    penalties = [row["penalty"] for row in metrics(tmp_path / "run")]
    assert penalties[0] < 1e-4 < penalties[-1]  # the base at first, but for bfloat16's rounding
    assert all(tensor.dtype == torch.float32 for tensor in weights(saved[-1]).values())
