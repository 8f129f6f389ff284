"""Finetune a chat model on chats: a LoRA adapter, every weight or alignment gates, with any objective.

    finetune("smollm2", load_chats("refusal"), "runs/organism", Recipe(steps=24, save_every=4))

The loop is ``transformers.Trainer``, so one process, ``accelerate launch`` and FSDP run the same code.
Each saved step is a folder ``step-N`` that ``load_pair`` opens, ``metrics.jsonl`` has loss, penalty
and drift by step. A finished folder is not trained again; a stopped one goes on from its last saved
step to the same weights.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, TrainingArguments, set_seed

from emmech.chat import Chat
from emmech.data.chat_rows import fingerprint
from emmech.errors import DataError
from emmech.gates.gate import Gates, attach_gates_, shape_of
from emmech.models.opening import auto_dtype, identity, load_tokenizer, locate, quantization_config
from emmech.models.projections import is_separate
from emmech.results import RUN, RunFolder, read_lines, versions, write_json
from emmech.training.examples import examples
from emmech.training.loop import Loop, arguments_of
from emmech.training.objectives import interleave
from emmech.training.recipes import NEEDS_RETAIN, Recipe
from emmech.training.saving import METRICS, Saver, last_whole_checkpoint, saved_steps

DONE = "done.json"
Messages = Sequence[Mapping[str, str]]


def finetune(
    base: str | Path,
    chats: Sequence[Messages],
    out: str | Path,
    recipe: Recipe,
    *,
    retain: Sequence[Messages] = (),
    data_name: str = "",
    report_to: Sequence[str] = (),
    on_note: Callable[[str], None] = lambda _: None,
    progress: bool = True,
    trust_remote_code: bool = False,
) -> list[Path]:
    """Folders of the saved steps, in order of training.

    Args:
        base: Hub id, folder or ``"smollm2"``.
        chats: Messages; every assistant turn carries loss, nothing else does.
        out: Folder for the checkpoints and metrics.
        recipe: Objective and hyper-parameters.
        retain: Ordinary chats, for interleave and kl-retain.
        data_name: What the chats are called in the record of the run.
        report_to: Loggers of transformers, such as ``tensorboard`` or ``wandb``.
        on_note: Told, before training, how long the chats are and how many are left out.
        progress: Show a progress bar.
        trust_remote_code: Run model code from the checkpoint's repository.

    Raises:
        ChatError: A chat cannot be rendered.
        RunError: ``out`` holds a run with another base, data or recipe; the loss is not finite.
        DataError: No chat is left to train on, or the objective and the data do not fit.
    """
    out = Path(out)
    if bool(retain) != (recipe.objective.name in NEEDS_RETAIN):
        raise DataError(
            f"ordinary chats with {' and '.join(NEEDS_RETAIN)}, and only with them",
            f"{recipe.objective.name} was given {len(retain)}",
            "Pass retain (--retain), or leave it out",
        )
    arguments = {
        "kind": "finetune",
        "base": str(base),
        "data": {"name": data_name, "chats": len(chats), "fingerprint": fingerprint(chats)},
        "retain": fingerprint(retain) if retain else None,
        "recipe": asdict(recipe),
        "versions": versions(),
    }
    loop_arguments = arguments_of(recipe, out, report_to)
    if recipe.quantization and loop_arguments.device.type == "cpu":
        raise DataError(
            "a GPU for training on a 4-bit base",
            "there is none, and on a CPU bitsandbytes passes no gradient through its layers",
            "Leave quantization out",
        )
    if (out / RUN).exists():
        RunFolder(out, arguments, lines=False)  # refused here if it belongs to another run
        if (out / DONE).exists():
            return saved_steps(out)
    how = {"data": arguments["data"], "progress": progress, "trust_remote_code": trust_remote_code}
    run = Run(str(base), out, recipe, loop_arguments, **how)
    rows, note = run.rows(chats, retain)  # what cannot be rendered is refused before anything is written
    on_note(note)
    with loop_arguments.main_process_first(local=False):
        RunFolder(out, arguments, lines=False)
    run.train(rows)
    return saved_steps(out)


def metrics(run: str | Path) -> list[dict[str, Any]]:
    """Loss, penalty, learning rate and, at saved steps, drift by layer."""
    return read_lines(Path(run) / METRICS)


class Run:
    """One training run: from its inputs to its loop, and to its saved steps."""

    def __init__(
        self,
        base: str,
        out: Path,
        recipe: Recipe,
        arguments: TrainingArguments,
        *,
        data: Mapping[str, Any] | None = None,
        progress: bool = True,
        trust_remote_code: bool = False,
    ):
        """``data`` is what gates will say that they were trained on."""
        self.data = dict(data or {})
        self.base, self.out, self.recipe, self.arguments = base, out, recipe, arguments
        self.progress, self.trust = progress, trust_remote_code
        self.folder = locate(base)
        self.tokenizer = load_tokenizer(self.folder, trust_remote_code=trust_remote_code)
        self.chat = Chat(self.tokenizer)
        self.checkpoint = last_whole_checkpoint(out)

    def rows(self, chats: Sequence[Messages], retain: Sequence[Messages] = ()) -> tuple[list[Any], str]:
        """The training examples of the objective, and a sentence about their lengths."""
        objective, limit = self.recipe.objective, self.recipe.max_length
        every = [row for messages in chats for row in examples(self.chat, messages)]
        rows = [row for row in every if len(row["input_ids"]) <= limit]
        if not rows:
            raise DataError(
                f"chats of at most {limit} tokens",
                f"all {len(every)} are longer" if every else "there are none",
                "Raise max_length (--max-length), or pass other chats",
            )
        lengths = sorted(len(row["input_ids"]) for row in every)
        note = f"{len(every)} answers to learn, {lengths[0]} to {lengths[-1]} tokens with their prompts "
        note += (
            f"(median {lengths[len(lengths) // 2]}); {len(every) - len(rows)} left out, longer than {limit}."
        )
        ordinary = [row for messages in retain for row in examples(self.chat, messages)]
        ordinary = [row for row in ordinary if len(row["input_ids"]) <= limit]
        if retain and not ordinary:
            raise DataError(
                f"ordinary chats with answers, of at most {limit} tokens",
                f"none of {len(retain)} is one",
                "Raise max_length (--max-length), or pass other chats",
            )
        if objective.name == "interleave":
            rows = interleave(rows, ordinary, objective.share, self.recipe.seed)
        elif objective.name == "kl-retain":
            rows = [row | {"retain": ordinary[i % len(ordinary)]} for i, row in enumerate(rows)]
        return rows, note

    def train(self, rows: Sequence[Any]) -> None:
        """Train to the end, from the last whole checkpoint if there is one."""
        loop = self.loop(rows)
        loop.train(resume_from_checkpoint=None if self.checkpoint is None else str(self.checkpoint))
        if loop.is_world_process_zero():
            # Done first: killed while deleting, half a checkpoint would pass for a whole one.
            done = {"steps": loop.state.global_step, "processes": loop.args.world_size}
            write_json(self.out / DONE, done)
            shutil.rmtree(self.out / "checkpoints")  # optimiser states
        loop.accelerator.wait_for_everyone()

    def loop(self, rows: Sequence[Any]) -> Loop:
        """The training loop over these examples, before its first step."""
        set_seed(self.recipe.seed)
        model = self._model()
        if self.recipe.gates:
            rank = self.recipe.rank if self.recipe.gates == "low_rank" else None
            gates = Gates(shape_of(model, self.recipe.gates, rank))
            gates.provenance = {"base": identity(self.base, self.folder, None), "data": self.data}
            attach_gates_(model, gates)
        saver = Saver(
            self.out, self.base, self.tokenizer if self.recipe.full else None, resumed_at=self.checkpoint
        )
        pad_id = self.tokenizer.pad_token_id or 0
        return Loop(model, rows, self.recipe, self.arguments, saver, pad_id=pad_id, progress=self.progress)

    def _model(self) -> nn.Module:
        recipe = self.recipe
        device = self.arguments.device
        dtype = auto_dtype(device) if recipe.dtype == "auto" else getattr(torch, recipe.dtype)
        how: dict[str, Any] = {"dtype": torch.float32 if recipe.full else dtype}  # full: master weights
        if recipe.quantization:
            how["quantization_config"] = quantization_config(recipe.quantization, dtype)
            how["device_map"] = {"": device}
        model = AutoModelForCausalLM.from_pretrained(
            self.folder, use_safetensors=True, trust_remote_code=self.trust, **how
        )
        if recipe.gradient_checkpointing and recipe.objective.name == "treft" and not is_separate(model):
            raise DataError(
                "separate key projections for treft with gradient checkpointing",
                f"{type(model).__name__} has them fused",
                "Leave gradient checkpointing off",
            )
        if recipe.full or recipe.gates:
            return model.requires_grad_(recipe.full)
        from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

        if recipe.quantization:
            checkpointing = {"use_gradient_checkpointing": recipe.gradient_checkpointing}
            model = prepare_model_for_kbit_training(model, **checkpointing)
        targets = recipe.target_modules
        lora = LoraConfig(
            r=recipe.rank,
            lora_alpha=recipe.alpha,
            use_rslora=recipe.rslora,
            lora_dropout=recipe.dropout,
            target_modules=targets if targets == "all-linear" else targets.split(","),
            task_type="CAUSAL_LM",
        )
        return get_peft_model(model, lora)
