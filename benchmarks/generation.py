"""Greedy answers with the base's prefix K/V in the finetuned model: against the same patch by other tools.

All get the same prompts in one batch, run the donor too, and must first give the same tokens in float32.
Other tools take turns with ours one after the other, so that copies of the models are held for one at a time.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from benchmarks import generation_peers as peers
from benchmarks.measure import Aim, Row, alternated, not_measured, ratio, release, why_not
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
    obstacles = check(setting)
    release()
    bench = Bench(setting.pair(), load_demo("test")[:N_PROMPTS], NEW_TOKENS)
    bench.ours()
    rows = [against(bench, name, obstacles[name], setting.repeats) for name in peers.PEERS]
    few = Bench(bench.pair, bench.questions[:: N_PROMPTS // N_ALONE], NEW_TOKENS)
    plain = peers.plain_generate(bench.pair, "finetuned")
    ways = {
        "ours": bench.ours,
        "plain": lambda: plain(bench.batch, NEW_TOKENS),
        "prompt by prompt": few.one_by_one,
    }
    ways["plain"]()
    few.one_by_one()
    times = alternated(ways, setting.repeats)
    rows.append(ratio(title("plain generate, no patch"), times["plain"], times["ours"], Aim(1.3)))
    scale = N_PROMPTS / N_ALONE
    rows.append(
        ratio(title("prompt by prompt"), times["prompt by prompt"], times["ours"], Aim(15.0), scale=scale)
    )
    return rows


def against(bench: "Bench", name: str, obstacle: str | None, repeats: int) -> Row:
    """One other tool, whose copies of the models are gone afterwards."""
    obstacle = obstacle or why_not(peers.PEERS[name][0], bench.pair.base.module)
    if obstacle is not None:
        return not_measured(title(name), obstacle)
    other = bench.other(name)
    other()  # the check was of another dtype
    times = alternated({"theirs": other, "ours": bench.ours}, repeats)
    del other
    release()
    return ratio(title(name), times["theirs"], times["ours"], Aim(1.0))


def title(name: str) -> str:
    return f"{name} / ours ({N_PROMPTS} prompts, {NEW_TOKENS} tokens)"


def check(setting: Setting) -> dict[str, str | None]:
    """All ways give the same tokens, which are not those without a patch; why others are left out."""
    pair = setting.pair(dtype="float32")  # others round otherwise: in bfloat16 answers part by chance
    bench = Bench(pair, questions(N_CHECKED, "on-topic"), 8)
    ours = bench.one_by_one()
    assert bench.ours() == [bench.text(ids) for ids in ours], "ours and prompt by prompt differ"
    plain = peers.plain_generate(pair, "finetuned")(bench.batch, 8)
    assert bench.ended(plain) != ours, "the patch changes no answer"
    obstacles = {}
    for name, (package, _) in peers.PEERS.items():
        obstacles[name] = why_not(package, pair.base.module)
        if obstacles[name] is None:
            assert bench.ended(bench.other(name)()) == ours, f"{name} answers otherwise"
            release()
    return obstacles


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

    def other(self, name: str) -> Callable[[], Answers]:
        """The same by another tool, on plain copies of the two models."""
        _, make = peers.PEERS[name]
        way = make(self.pair)
        return lambda: way(self.batch, self.new_tokens)

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
