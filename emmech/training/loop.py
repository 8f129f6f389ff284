"""transformers' training loop around emmech's objectives."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerState,
    TrainingArguments,
)
from transformers.integrations import get_available_reporting_integrations
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK

from emmech.errors import DataError, RunError
from emmech.gates.files import load_gates, save_gates
from emmech.models.opening import auto_dtype
from emmech.models.projections import Projections, projected
from emmech.training.examples import Example, collate, positions_of
from emmech.training.objectives import IGNORED, deviations, kl_from_base, sft, treft
from emmech.training.recipes import Objective, Recipe
from emmech.training.reference import FrozenBase, SharedReference, select
from emmech.training.saving import Saver, last_good


def arguments_of(recipe: Recipe, out: Path, report_to: Sequence[str]) -> TrainingArguments:
    """Transformers' settings for a recipe, in every process of a run."""
    ready = get_available_reporting_integrations()
    if absent := [name for name in report_to if name not in ready]:
        raise DataError(
            f"loggers that are installed ({', '.join(ready) or 'none is'})",
            f"got {', '.join(absent)}",
            "Install the package (pip install tensorboard, wandb ...), or leave report_to out",
        )
    on_cpu = not torch.cuda.is_available()
    # Of a full finetune the weights stay in float32 and only the arithmetic is in bfloat16.
    auto = auto_dtype(torch.device("cpu" if on_cpu else "cuda"))
    arithmetic = auto if recipe.dtype == "auto" else getattr(torch, recipe.dtype)
    arguments = TrainingArguments(
        output_dir=str(out / "checkpoints"),
        max_steps=recipe.steps or -1,
        num_train_epochs=recipe.epochs,
        save_steps=recipe.save_every,
        save_total_limit=2,  # the newest may be half written when a run is killed
        learning_rate=recipe.learning_rate,
        # transformers' own "constant" takes no warm-up
        lr_scheduler_type="constant_with_warmup" if recipe.schedule == "constant" else recipe.schedule,
        warmup_steps=recipe.warmup_steps,
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.max_grad_norm,
        optim=recipe.optimizer,
        activation_checkpointing=recipe.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False},
        bf16=recipe.full and arithmetic == torch.bfloat16,
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to=list(report_to) or "none",
        seed=recipe.seed,
        remove_unused_columns=False,
        dataloader_pin_memory=not on_cpu,
        ddp_find_unused_parameters=False,
        use_cpu=on_cpu,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # several GPUs by accelerate, never by DataParallel
    world, micro = arguments.world_size, recipe.micro_batch_size
    per_process = micro or recipe.batch_size // world
    if per_process == 0 or recipe.batch_size % (per_process * world):
        raise DataError(
            f"a batch_size that {world} processes of {per_process or 'at least one'} chats divide",
            f"it is {recipe.batch_size}",
            "Choose a multiple",
        )
    arguments.per_device_train_batch_size = per_process
    arguments.gradient_accumulation_steps = recipe.batch_size // (per_process * world)
    return arguments


class Loop(Trainer):
    """Adds the objective's penalty to the loss, its parts and the drift to the log."""

    def __init__(
        self,
        model: nn.Module,
        rows: Sequence[Example],
        recipe: Recipe,
        arguments: TrainingArguments,
        saver: Saver,
        *,
        pad_id: int,
        progress: bool,
    ):
        def batched(batch: Sequence[dict[str, Any]]) -> dict[str, Any]:
            tensors: dict[str, Any] = collate(batch, pad_id)
            if "retain" in batch[0]:
                tensors["retain"] = collate([row["retain"] for row in batch], pad_id)
            return tensors

        super().__init__(model, arguments, train_dataset=list(rows), data_collator=batched, callbacks=[saver])
        self.loss_is_scaled_for_ga = False  # compute_loss returns what is to be averaged
        self.model_accepts_loss_kwargs = True  # so that the labelled tokens of a step are counted
        for callback in (DEFAULT_PROGRESS_CALLBACK, PrinterCallback):  # the former is another in Jupyter
            self.remove_callback(callback)
        if progress:
            self.add_callback(_Progress)
        self.recipe, self.objective, self.saver = recipe, recipe.objective, saver
        own = self.objective.name == "treft" and self.objective.reference == "own"
        needs_base = own or self.objective.name in ("kl-train", "kl-retain")
        self.frozen = FrozenBase(model, copied=recipe.full and needs_base)
        model.eval()
        self.reference = None
        if self.objective.name == "treft" and not own:
            with self.accelerator.autocast():
                self.reference = SharedReference(model, rows, self.objective)
        self.first_row = rows[0]
        with self.accelerator.autocast():
            self.untouched = SharedReference(model, rows[:1], Objective("treft"))
        self.parts: dict[str, list[Tensor]] = {}

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """The batches of an optimiser step; also counts the tokens that its penalty is a mean over."""
        batches, n_labelled = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches:
            n_held = torch.stack([self._held(batch).sum() for batch in batches]).sum()
            self.n_held = self.accelerator.reduce(n_held.to(device), reduction="sum")
        return batches, n_labelled

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Cross-entropy over all labelled tokens of the optimiser step, plus the weighted penalty.

        Both are scaled so that their mean over processes and micro-batches is that of the whole step.
        """
        assert not return_outputs and num_items_in_batch is not None
        n_parts = self.current_gradient_accumulation_steps * self.accelerator.num_processes
        share = self._held(inputs).sum() * n_parts / self.n_held
        retain = inputs.pop("retain", None)
        penalty = None
        if self.objective.name == "treft":
            loss, penalty = self._treft(model, inputs)
        elif self.objective.name == "kl-train":
            base_logits = self._base_logits(model, inputs)
            logits, targets = _forward(model, inputs)
            loss, penalty = sft(logits, targets), kl_from_base(logits, base_logits, targets)
        else:
            loss = sft(*_forward(model, inputs))
        if self.objective.name == "kl-retain":
            base_logits = self._base_logits(model, retain)
            logits, targets = _forward(model, retain)
            penalty = kl_from_base(logits, base_logits, targets)
        loss = loss * n_parts / num_items_in_batch
        self._note("sft", loss)
        if penalty is not None:
            penalty = penalty * share
            self._note("penalty", penalty)
            loss = loss + self.objective.weight * penalty
        if not torch.isfinite(loss):
            raise RunError(
                "a finite loss",
                f"at step {self.state.global_step + 1} it is {loss.item()}",
                f"Lower the learning rate or the weight; {last_good(self.saver.out)}",
            )
        return loss

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Of a model in gate training, the gates alone."""
        if self.recipe.gates is None:
            super()._save(output_dir, state_dict)
        elif self.args.should_save:
            save_gates(self._bare(self.model).alignment_gates, output_dir or self.args.output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.recipe.gates is None:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            trained = load_gates(resume_from_checkpoint).state_dict()
            self._bare(self.model).alignment_gates.load_state_dict(trained)

    def _held(self, batch: Mapping[str, Any]) -> Tensor:
        """True on the tokens that the penalty is a mean over."""
        if self.objective.name == "treft":
            return positions_of(batch, self.objective.segments)
        of = batch["retain"] if self.objective.name == "kl-retain" else batch
        return of["labels"] != IGNORED

    def _treft(self, model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        positions = positions_of(batch, self.objective.segments)
        if self.reference is not None:
            reference = self.reference(batch)
        else:
            reference = select(self._base_projections(model, batch), positions)
        with projected(self._bare(model), self.objective.layers) as recording:
            logits, targets = _forward(model, batch, **recording.inputs)
            penalty = treft(select(recording.read(), positions), reference)
        return sft(logits, targets), penalty

    def _base_projections(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Projections:
        with (
            self.accelerator.autocast(),
            self.frozen.active(model, self._bare(model)) as base,
            projected(self._bare(base), self.objective.layers) as recording,
        ):
            _forward(base, batch, **recording.inputs)
            return recording.read()

    def _base_logits(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        with self.accelerator.autocast(), self.frozen.active(model, self._bare(model)) as base:
            return _forward(base, batch)[0]

    def _bare(self, model: nn.Module) -> nn.Module:
        return self.accelerator.unwrap_model(model)

    def _note(self, name: str, value: Tensor) -> None:
        self.parts.setdefault(name, []).append(value.detach())

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the parts of the loss, and at saved steps how far each layer's prefix K and V moved."""
        if "loss" in logs:
            for name, values in self.parts.items():
                mean = self.accelerator.reduce(torch.stack(values).mean(), reduction="mean")
                logs[name] = float(mean)
            self.parts.clear()
            step = self.state.global_step
            if step % self.recipe.save_every == 0 or step == self.state.max_steps:
                logs |= self._drift()
        super().log(logs, start_time)

    @torch.no_grad()
    def _drift(self) -> dict[str, float]:
        """Relative deviation of K and V at the prefix from the base's, by layer."""
        batch = collate([self.first_row], 0)
        prefix = positions_of(batch, ("prefix",))
        model = self.model_wrapped
        model.eval()
        with projected(self._bare(model)) as recording:
            model(input_ids=batch["input_ids"].to(self.args.device), **recording.inputs)
            current = select(recording.read(), prefix)
        moved = deviations(current, self.untouched(batch))
        return {
            f"drift/{layer}/{part}": float(value)
            for layer, both in moved.items()
            for part, value in zip(("key", "value"), both, strict=True)
        }


class _Progress(ProgressCallback):
    """A bar with the time left and the loss, instead of a line per step."""

    def on_log(
        self,
        _: TrainingArguments,
        __: TrainerState,
        *___: Any,
        logs: dict[str, float] | None = None,
        **____: Any,
    ) -> None:
        """Show the loss at the end of the bar."""
        if self.training_bar is not None and logs and "loss" in logs:
            self.training_bar.set_postfix(loss=f"{logs['loss']:.3f}")


def _forward(model: nn.Module, batch: Mapping[str, Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    """Logits of the positions before which some row has a label, and the targets there."""
    targets = batch["labels"][:, 1:]
    wanted = (targets != IGNORED).any(0).nonzero().squeeze(1)
    output = model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        logits_to_keep=wanted,
        **{"use_cache": False} | options,
    )
    return output.logits, targets[:, wanted]
