"""Greedy answers with the base's prefix K/V in the finetuned model: against the same patch by other tools.

All get the same prompts in one batch, run the donor too, and must first give the same tokens in float32.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from benchmarks import generation_peers as peers
from benchmarks.measure import Aim, Row, alternated, installed, not_measured, ratio
from benchmarks.setting import Setting, questions
from emmech.data.questions import load_demo
from emmech.models.checkpoints import ModelPair
from emmech.models.generation import Decoding, make_batch
from emmech.piggyback.patching import Condition, KVPatch, patch_kv
from emmech.piggyback.running import Job, render_rows, run

N_PROMPTS, N_ALONE, NEW_TOKENS = 80, 20, 16
N_CHECKED = 8
REPAIR = Condition("repair:prefix", "finetuned", (KVPatch(("prefix",), "base"),))
Answers = list[list[int]]


def measure(setting: Setting) -> list[Row]:
    """A row per other way, over ours."""
    check(setting)
    bench = Bench(setting.pair(), load_demo("test")[:N_PROMPTS], NEW_TOKENS)
    few = Bench(bench.pair, bench.questions[:: N_PROMPTS // N_ALONE], NEW_TOKENS)
    plain = peers.plain_generate(bench.pair, "finetuned")
    ways: dict[str, Callable[[], object]] = {"ours": bench.ours} | bench.others()
    ways["plain generate, no patch"] = lambda: plain(bench.batch, NEW_TOKENS)
    ways["prompt by prompt"] = few.one_by_one
    for way in ways.values():
        way()  # the check was of another dtype
    times = alternated(ways, setting.repeats)
    what = f"({N_PROMPTS} prompts, {NEW_TOKENS} tokens)"
    aims = {"plain generate, no patch": 1.3, "prompt by prompt": 15.0}
    rows = []
    for name in ways:
        if name != "ours":
            scale = N_PROMPTS / N_ALONE if name == "prompt by prompt" else 1.0
            aim = Aim(aims.get(name, 1.0))
            row = ratio(f"{name} / ours {what}", times[name], times["ours"], aim, scale=scale)
            rows.append(row)
    missing = [name for name in ("pyvene",) if not installed(name)]
    return rows + [not_measured(f"{name} / ours {what}", "not installed") for name in missing]


def check(setting: Setting) -> None:
    """All ways give the same tokens, which are not those without a patch."""
    pair = setting.pair("float32")
    bench = Bench(pair, questions(N_CHECKED, "on-topic"), 8)
    ours = bench.one_by_one()
    assert bench.ours() == [bench.text(ids) for ids in ours], "ours and prompt by prompt differ"
    plain = peers.plain_generate(pair, "finetuned")(bench.batch, 8)
    assert bench.ended(plain) != ours, "the patch changes no answer"
    for name, way in bench.others().items():
        assert bench.ended(way()) == ours, f"{name} answers otherwise"


@dataclass
class Bench:
    """Questions, rendered and as one left-padded batch."""

    pair: ModelPair
    questions: Sequence
    new_tokens: int

    def __post_init__(self):
        self.rows = render_rows(self.pair, self.questions, self.new_tokens)
        prompts = [row.prompt for row in self.rows]
        self.batch = make_batch(prompts, self.pair.base.device, share_prefix=False)

    def others(self) -> dict[str, Callable[[], Answers]]:
        """The same by the tools that are installed, on plain copies of the two models."""
        made = {
            "TransformerLens generate with hooks": peers.with_transformer_lens(self.pair),
            "nnsight generate": peers.with_nnsight(self.pair),
        }
        if installed("pyvene"):
            made["pyvene generate"] = peers.with_pyvene(self.pair)
        return {name: lambda way=way: way(self.batch, self.new_tokens) for name, way in made.items()}

    def ours(self) -> list[str]:
        """The texts of a run of emmech, donor included."""
        job = Job(tuple(self.rows), (REPAIR,))
        records, _ = run(
            self.pair, [job], Decoding(self.new_tokens), batch_size=None, folder=None, progress=False
        )
        texts = {record["question_id"]: record["response"] for record in records}
        return [texts[row.question.id] for row in self.rows]

    def one_by_one(self) -> Answers:
        """Prompt by prompt through ``generate``, as the papers' releases work."""
        made = []
        for row in self.rows:
            inputs = patch_kv(self.pair, [row.prompt])
            with self.pair.finetuned.active() as model:
                ids = model.generate(
                    **inputs.inputs,
                    past_key_values=inputs.cache(),
                    max_new_tokens=self.new_tokens,
                    do_sample=False,
                    eos_token_id=list(self.pair.chat.end_ids),
                    pad_token_id=self.pair.chat.end_ids[0],
                )
            made += ids[:, inputs.batch.input_ids.shape[1] :].tolist()
        return self.ended(made)

    def ended(self, answers: Answers | torch.Tensor) -> Answers:
        """Answers up to their ends."""
        rows = answers.tolist() if isinstance(answers, torch.Tensor) else answers
        ends = self.pair.chat.end_ids
        return [row[: next((at for at, one in enumerate(row) if one in ends), None)] for row in rows]

    def text(self, ids: Sequence[int]) -> str:
        """An answer as a run of emmech records it."""
        return self.pair.chat.tokenizer.decode(ids, skip_special_tokens=True).strip()
