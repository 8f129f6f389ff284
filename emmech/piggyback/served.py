"""Answers of an unpatched model from an OpenAI-compatible server, among those that are made here.

    served = {"base": Served("my-model", base_url="http://localhost:8000/v1")}
    evaluate(pair, questions, conditions, served=served, samples=20, out="runs/served")

A server such as vLLM samples a large model many times quicker; what is patched or gated runs here alone.
Each answer is in the run folder as soon as it arrives, and a stopped run asks for what it lacks. The
prompts are those of this machine if the server has the same template (control tokens in a question
aside, which stay text here). That it has the same weights, and samples as it is told, is up to whoever
starts it: vLLM needs ``--generation-config vllm`` to leave out the model's own sampling settings,
``transformers serve`` samples only where those say ``do_sample``.
"""

import hashlib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from tqdm.auto import tqdm

from emmech.chat import Chat
from emmech.completions import Endpoint, Reply, Session
from emmech.endpoint import require_openai, run_to_end
from emmech.errors import EmmechError, RunError
from emmech.models.generation import Decoding
from emmech.piggyback.patching import Condition
from emmech.piggyback.running import Row
from emmech.results import Record, RunFolder


@dataclass(frozen=True)
class _Wanted:
    """One answer to ask for."""

    condition: str
    row: Row
    sample: int
    decoding: Decoding
    chat: Chat

    @property
    def key(self) -> tuple[str, str, int]:
        return self.condition, self.row.name, self.sample

    @property
    def seed(self) -> int:
        """Another one for each answer, the same in each run."""
        name = f"{self.decoding.seed}/{self.row.name}/{self.sample}"
        return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4]) >> 1


@dataclass(frozen=True, kw_only=True)
class Served(Endpoint):
    """A model on an OpenAI-compatible server that answers for a condition.

    Raises:
        DataError: `openai` is not installed, or there is no key for OpenAI's own endpoint.
    """

    optional: ClassVar[tuple[str, ...]] = ("seed", "max_tokens")

    def __post_init__(self):
        require_openai()
        self.key()

    @property
    def id(self) -> str:
        """Model and host, as records name them."""
        return f"{self.model}@{self.host or 'api.openai.com'}"

    def describe(self) -> Record:
        """What a run records of it, and compares before it is continued."""
        return {"id": self.id, "options": dict(self.options)}

    def request(self, wanted: _Wanted) -> dict[str, Any]:
        """The body of a request, the model's name aside."""
        decoding, chat = wanted.decoding, wanted.chat
        body: dict[str, Any] = {
            "max_tokens": decoding.max_new_tokens,
            "temperature": decoding.temperature,
            "top_p": decoding.top_p,
            "seed": wanted.seed if decoding.temperature > 0 else None,
            "chat_template_kwargs": chat.options or None,
        }
        return {**self.fitted(body), "messages": chat.messages(wanted.row.question.messages)}


def refuse_unservable(conditions: Sequence[Condition], served: Mapping[str, Served], chat: Chat) -> None:
    """Refuse conditions that no server can answer for.

    Raises:
        EmmechError: One is unknown, patched or gated, or its prompt cannot be sent.
    """
    free = [c.name for c in conditions if c.source is None and c.target in ("base", "finetuned")]
    for name in served:
        if name not in free:
            raise EmmechError(
                f"a served condition among the unpatched ones ({', '.join(free)})",
                f"'{name}' is not one: servers patch nothing",
                "Leave it out of served (--served)",
            )
    if served and chat.system is None:
        raise EmmechError(
            "a prompt that a server can render",
            "with system=None the template's own system block is cut out of it",
            "Choose a system text or the default, or leave out served",
        )


def ask_served(
    rows: Sequence[Row],
    served: Mapping[str, Served],
    decoding: Decoding,
    chat: Chat,
    folder: RunFolder,
    progress: bool = True,
) -> None:
    """Add the answers that the folder lacks, each on disk as it arrives.

    Raises:
        RunError: Some did not arrive; those that did are kept.
    """
    folder.keep(folder.records, folder.checks)  # a line that a kill broke off would hide those behind it
    have = {(r["condition"], r["row"], r["sample"]) for r in folder.records}
    for name, server in served.items():
        every = [
            _Wanted(name, row, sample, decoding, chat) for row in rows for sample in range(decoding.samples)
        ]
        todo = [wanted for wanted in every if wanted.key not in have]
        with tqdm(total=len(todo), disable=not progress, unit="answer", desc=server.id) as bar:
            _ask(todo, server, folder, bar)
        if server.left_out("seed"):
            warnings.warn(f"{server.id} takes no seed: its answers cannot be repeated", stacklevel=2)
        _warn_of_repetition(server, [r for r in folder.records if r["condition"] == name], decoding)


def _ask(todo: Sequence[_Wanted], server: Served, folder: RunFolder, bar: tqdm) -> None:
    failures: list[str | None] = []

    def done(wanted: _Wanted, reply: Reply) -> None:
        if reply.body is None:
            failures.append(reply.reason)
        else:
            folder.append([_record(wanted, reply.text.strip(), server)], None)
            bar.update()

    session = Session(server, done)
    run_to_end(session.work_off(todo))
    if session.n_done < len(todo):
        raise RunError(
            f"{len(todo)} answers from {server.id}",
            f"{len(todo) - session.n_done} did not arrive ({session.stop or failures[-1]})",
            "Check the server, the model's name and the key, then run again: what arrived is kept",
        )


def _record(wanted: _Wanted, text: str, server: Served) -> Record:
    return {
        "question_id": wanted.row.question.id,
        "question": wanted.row.prompt.query,
        "group": wanted.row.question.group,
        "condition": wanted.condition,
        "sample": wanted.sample,
        "response": text,
        # Servers differ in whether they count the token that ends an answer.
        "n_new_tokens": len(wanted.chat.tokenizer(text, add_special_tokens=False)["input_ids"]),
        "row": wanted.row.name,
        **wanted.row.extra,
        "served_by": server.id,
    }


def _warn_of_repetition(server: Served, records: Sequence[Record], decoding: Decoding) -> None:
    """Samples that never differ are one answer counted many times."""
    texts: dict[str, set[str]] = {}
    for record in records:
        texts.setdefault(record["row"], set()).add(record["response"])
    if decoding.samples > 1 and decoding.temperature > 0 and all(len(said) == 1 for said in texts.values()):
        warnings.warn(
            f"all {decoding.samples} samples of each question are the same: {server.id} seems to decode "
            f"greedily in spite of temperature {decoding.temperature}",
            stacklevel=3,
        )
