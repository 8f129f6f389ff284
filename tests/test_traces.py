"""Patches and steering in nnsight traces: the default engine's results, here and as sent elsewhere."""

import socket
from contextlib import contextmanager

import pytest
import tiny
import torch

from emmech.engines.in_traces import (
    EngineError,
    kv_edits,
    kv_places,
    record,
    resid_edits,
    steer_edits,
    traced_answers,
    traced_logits,
)
from emmech.errors import PatchError
from emmech.models.checkpoints import load_pair
from emmech.models.generation import Decoding, decode
from emmech.models.views import nnsight_view
from emmech.piggyback.patching import Bench, Condition, KVPatch, ResidPatch
from emmech.steering.directions import Direction
from emmech.steering.states import SITES
from emmech.steering.steer import Steer

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma3", "gpt_neox", "phi3")
NAMES = [str(number) for number in range(len(tiny.QUESTIONS))]
CLOSE = {"atol": 1e-4, "rtol": 0}  # float32, the same attention


def question_batch(pair):
    prompts = [pair.chat.render(question) for question in tiny.QUESTIONS]
    return Bench(pair).batch(prompts, NAMES, share_prefix=False)


def default_engine(pair, run, condition, n_new=4):
    """Last logits and greedy answers."""
    start = run.prefill(condition)
    logits = start.logits
    with pair.side(condition.target).active() as model:
        return logits, decode(model, start, Decoding(n_new), NAMES, end_ids=())


def kv_patched(pair, run, remote=False, **settings):
    """The same of the finetuned model in a trace, patched from the base."""
    base, tuned = nnsight_view(pair, "base"), nnsight_view(pair)
    with pair.base.active():
        donor = record(base, run.batch, kv_places(base), remote=remote)
    edits = kv_edits(tuned, run.batch, donor, **settings)
    with pair.finetuned.active():
        logits = traced_logits(tuned, run.batch, edits, remote=remote)[:, -1]
        return logits, traced_answers(tuned, run.batch, edits, max_new_tokens=4, remote=remote)


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_view_is_the_side_that_is_active_and_leaves_it_as_it_was(make_pair, architecture, kind):
    pair = make_pair(architecture, kind)
    run = question_batch(pair)
    for name in ("base", "finetuned"):
        wanted, answers = default_engine(pair, run, Condition(name, name))
        view = nnsight_view(pair, name)
        with pair.side(name).active():
            torch.testing.assert_close(traced_logits(view, run.batch)[:, -1], wanted, **CLOSE)
            assert traced_answers(view, run.batch, max_new_tokens=4) == answers
        again, _ = default_engine(pair, question_batch(pair), Condition(name, name))
        assert torch.equal(again, wanted)
    assert pair.chat.tokenizer.padding_side == "right"


@contextmanager
def norms_of_the_base(pair):
    """The finetuned model with the base's norms of keys: a trace patches before them, the default after."""
    theirs = dict(pair.base.module.named_parameters())
    own = [(name, one, one.data) for name, one in pair.finetuned.module.named_parameters()]
    norms = [(one, data, theirs[name].data) for name, one, data in own if ".k_norm." in name]
    try:
        for one, _, other in norms:
            one.data = other
        yield
    finally:
        for one, data, _ in norms:
            one.data = data


PATCHES = [
    ("lora", ("prefix",), {}),
    ("lora", ("query", "postfix"), {"value": False}),
    ("lora", ("prefix", "query"), {"key": False}),
    ("full", ("prefix",), {}),
    ("full", ("prefix", "postfix"), {"kv_heads": (1,)}),
]


@pytest.mark.parametrize(("kind", "segments", "part"), PATCHES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_patch_in_a_trace_is_that_of_the_default_engine(make_pair, architecture, kind, segments, part):
    pair = make_pair(architecture, kind)
    run, condition = (
        question_batch(pair),
        Condition("repair", "finetuned", (KVPatch(segments, "base", **part),)),
    )
    with norms_of_the_base(pair):
        wanted, answers = default_engine(pair, run, condition)
        logits, made = kv_patched(pair, run, segments=segments, **part)
        plain, _ = default_engine(pair, run, Condition("finetuned", "finetuned"))
    torch.testing.assert_close(logits, wanted, **CLOSE)
    assert made == answers
    assert ((wanted - plain).abs().amax(-1) > 1e-3).all()


@pytest.mark.parametrize("architecture", ["qwen3", "gemma3"])
def test_a_norm_of_keys_that_a_full_finetune_has_changed_acts_on_patched_keys_alone(make_pair, architecture):
    pair = make_pair(architecture, "full")
    for part, same in (({"key": False}, True), ({"value": False}, False)):
        run = question_batch(pair)
        condition = Condition("repair", "finetuned", (KVPatch(("prefix",), "base", **part),))
        wanted, _ = default_engine(pair, run, condition)
        logits, _ = kv_patched(pair, run, **part)
        assert torch.allclose(logits, wanted, **CLOSE) is same


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_residual_patch_in_a_trace_is_that_of_the_default_engine(make_pair, architecture):
    pair = make_pair(architecture, "full")
    run = question_batch(pair)
    condition = Condition("resid", "finetuned", resid=ResidPatch(("prefix", "query"), "base", 1))
    wanted, answers = default_engine(pair, run, condition)
    donor = record(nnsight_view(pair, "base"), run.batch, ["blocks.1.hook_resid_post"])
    edits = resid_edits(run.batch, donor, segments=("prefix", "query"))
    tuned = nnsight_view(pair)
    torch.testing.assert_close(traced_logits(tuned, run.batch, edits)[:, -1], wanted, **CLOSE)
    assert traced_answers(tuned, run.batch, edits, max_new_tokens=4) == answers


def a_steer(site, mode, parts=None, coeff=1.5):
    stream = torch.Generator().manual_seed(0)
    vectors = torch.randn(3, 32, generator=stream)
    level, unknown = torch.randn(3, generator=stream), (float("nan"),) * 3
    return Steer(
        Direction(vectors, level, site, "last", "mean", 4, unknown, unknown), coeff, (0, 2), mode, parts
    )


STEERS = [
    ("resid_post", "add", None),
    ("resid_pre", "ablate", ("prefix", "response")),
    ("attn_out", "clamp", ("last",)),
    ("mlp_out", "add", ("response",)),
]


@pytest.mark.parametrize(("site", "mode", "parts"), STEERS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_steering_in_a_trace_is_that_of_the_default_engine(make_pair, architecture, site, mode, parts):
    pair = make_pair(architecture)
    run, steer = question_batch(pair), a_steer(site, mode, parts)
    steered = pair.finetuned.under("steered", steer.on)
    pair = type(pair)(pair.base, pair.finetuned, pair.chat, {}, variants={"steered": steered})
    run.bench.pair = pair
    wanted, answers = default_engine(pair, run, Condition("steered", "steered"))
    view, edits = nnsight_view(pair), steer_edits(run.batch, steer)
    with pair.finetuned.active():
        torch.testing.assert_close(traced_logits(view, run.batch, edits)[:, -1], wanted, **CLOSE)
        assert traced_answers(view, run.batch, edits, max_new_tokens=4) == answers


def test_steering_keeps_the_dtype_of_the_model(make_pair, tmp_path):
    folder = tiny.save_base("llama", tmp_path)
    pair = load_pair(folder, folder, dtype="bfloat16", device="cpu")
    run, steer = question_batch(pair), a_steer("resid_post", "clamp")
    with steer.on(pair.base.module), torch.no_grad():
        wanted = pair.base.module(**run.batch.part(0)).logits
    logits = traced_logits(nnsight_view(pair), run.batch, steer_edits(run.batch, steer))
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits[:, -1], wanted[:, -1], atol=0.05, rtol=0.05)


def test_answers_end_where_they_are_told_to(make_pair):
    pair = make_pair("llama")
    run, view = question_batch(pair), nnsight_view(pair)
    with pair.finetuned.active():
        whole = traced_answers(view, run.batch, max_new_tokens=4)
        cut = traced_answers(view, run.batch, max_new_tokens=4, end_ids=(whole[0][2],))
    assert cut[0] == whole[0][: whole[0].index(whole[0][2])]


# As a server would run it, and where there is none


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox"])
def test_a_serialised_trace_gives_the_same(make_pair, architecture):
    pair = make_pair(architecture)
    run = question_batch(pair)
    here, there = (kv_patched(pair, run, remote=remote) for remote in (False, "local"))
    assert torch.equal(here[0], there[0])
    assert here[1] == there[1]
    view, edits = nnsight_view(pair), steer_edits(run.batch, a_steer("resid_post", "clamp"))
    with pair.finetuned.active():
        here, there = (
            traced_answers(view, run.batch, edits, max_new_tokens=3, remote=remote)
            for remote in (False, "local")
        )
    assert here == there


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox"])
def test_a_residual_patch_is_serialised_too(make_pair, architecture):
    pair = make_pair(architecture, "full")
    run, base, tuned = question_batch(pair), nnsight_view(pair, "base"), nnsight_view(pair)
    found = []
    for remote in (False, "local"):
        donor = record(base, run.batch, ["blocks.1.hook_resid_post"], remote=remote)
        edits = resid_edits(run.batch, donor, segments=("prefix", "query"))
        logits = traced_logits(tuned, run.batch, edits, remote=remote)
        found.append((logits, traced_answers(tuned, run.batch, edits, max_new_tokens=3, remote=remote)))
    here, there = found
    assert torch.equal(here[0], there[0]) and here[1] == there[1]
    assert not torch.equal(here[0], traced_logits(tuned, run.batch))


@pytest.fixture
def closed_port():
    """The address of a port at which nothing answers."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{one.getsockname()[1]}"


def test_no_key_no_hub_name_and_no_host_are_said(make_pair, monkeypatch, closed_port):
    from nnsight.modeling import huggingface
    from nnsight.schema.config import CONFIG

    pair = make_pair("llama")
    run, view = question_batch(pair), nnsight_view(pair)
    monkeypatch.setattr(CONFIG.APP, "REMOTE_LOGGING", False)
    monkeypatch.setattr(CONFIG.API, "APIKEY", None)
    with pytest.raises(EngineError, match=r"expected a key of NDIF, but there is none\. Set NDIF_API_KEY"):
        traced_logits(view, run.batch, remote=True)
    with pytest.raises(EngineError, match=r"load from the hub, but '.*base' is a folder here"):
        traced_logits(view, run.batch, remote=closed_port)
    monkeypatch.setattr(view, "repo_id", "owner/name")
    monkeypatch.setitem(huggingface._ID_CACHE, "owner/name", "owner/name")  # the hub is not asked
    unreachable = rf"an answer from '{closed_port}', but there was none \(ConnectionRefusedError"
    with pytest.raises(EngineError, match=unreachable):
        traced_answers(view, run.batch, max_new_tokens=2, remote=closed_port)
    monkeypatch.setattr(CONFIG.API, "APIKEY", "no key")
    monkeypatch.setattr(CONFIG.API, "HOST", closed_port)
    with pytest.raises(EngineError, match=unreachable):
        record(view, run.batch, ["blocks.0.hook_resid_post"], remote=True)


def test_places_and_projections_that_are_not_there_are_refused(make_pair):
    pair = make_pair("llama")
    run, view = question_batch(pair), nnsight_view(pair)
    with pytest.raises(PatchError, match=r"a model with the place 'blocks\.7\.hook_resid_post'"):
        record(view, run.batch, ["blocks.7.hook_resid_post"])
    donor = {"blocks.0.attn.qkv.hook_out": torch.zeros(5, 3, 64)}
    with pytest.raises(PatchError, match=r"the fused one of gpt_neox or phi3, but llama has another"):
        kv_edits(view, run.batch, donor)
    assert set(SITES) == {site for site, _, _ in STEERS}  # each is tried above
