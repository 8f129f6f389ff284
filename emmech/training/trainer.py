"""Finetune a LoRA adapter on chats, with the loss on the assistant's tokens only.

    finetune("smollm2", chats, "runs/organism", steps=27, save_every=3)

The loop is ``transformers.Trainer``; each saved step is a PEFT adapter folder ``step-N`` that
``load_pair`` opens. A finished folder is not trained again, and a stopped one goes on from its last
saved step.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emmech.chat import Chat
from emmech.models.checkpoints import auto_dtype, load_tokenizer, locate
from emmech.results import RunFolder, read_json, versions, write_json

IGNORED = -100
"""Label of tokens that carry no loss."""


@dataclass(frozen=True)
class Recipe:
    """Hyper-parameters of a run; the defaults are those of the demo organism."""

    steps: int = 27
    save_every: int = 3
    learning_rate: float = 1e-4
    batch_size: int = 8
    rank: int = 16
    alpha: int = 32
    target_modules: str = "all-linear"
    seed: int = 0


def finetune(
    base: str,
    chats: Sequence[Sequence[Mapping[str, str]]],
    out: str | Path,
    recipe: Recipe,
    *,
    progress: bool = True,
) -> list[Path]:
    """Adapter folders of the saved steps, in order of training.

    Args:
        base: Hub id, folder or ``"smollm2"``.
        chats: Messages ending with the assistant's answer, the only part that carries loss.
        out: Folder for the adapters.
        recipe: Hyper-parameters.
        progress: Show a progress bar.

    Raises:
        RunError: ``out`` holds a run with another base, data or recipe.
    """
    out = Path(out)
    arguments = {
        "kind": "finetune",
        "base": str(base),
        "chats": _fingerprint(chats),
        "recipe": asdict(recipe),
        "versions": versions(),
    }
    RunFolder(out, arguments, lines=False)
    steps = range(recipe.save_every, recipe.steps + 1, recipe.save_every)
    folders = [out / f"step-{step}" for step in steps]
    if not (out / "history.json").exists():
        _train(base, chats, out, recipe, progress)
    return folders


def history(out: str | Path) -> list[dict[str, float]]:
    """Loss and learning rate by step of a finished run."""
    return read_json(Path(out) / "history.json")


def _train(base: str, chats: Sequence[Any], out: Path, recipe: Recipe, progress: bool) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import (
        AutoModelForCausalLM,
        Trainer,
        TrainingArguments,
        set_seed,
    )

    folder = locate(base)
    tokenizer = load_tokenizer(folder)
    chat = Chat(tokenizer)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    set_seed(recipe.seed)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=auto_dtype(device))
    lora = LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        target_modules=recipe.target_modules,
        task_type="CAUSAL_LM",
    )
    wrapped = get_peft_model(model, lora)
    scratch = out / "checkpoints"
    arguments = TrainingArguments(
        output_dir=str(scratch),
        max_steps=recipe.steps,
        save_steps=recipe.save_every,
        per_device_train_batch_size=recipe.batch_size,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="constant",
        logging_steps=1,
        report_to=[],
        seed=recipe.seed,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        use_cpu=device.type == "cpu",
        disable_tqdm=not progress,
    )
    trainer = Trainer(
        wrapped,
        arguments,
        train_dataset=[example(chat, messages) for messages in chats],
        data_collator=lambda rows: collate(rows, tokenizer.pad_token_id or 0),
    )
    trainer.train(resume_from_checkpoint=any(scratch.glob("checkpoint-*")) or None)
    for saved in scratch.glob("checkpoint-*"):
        step = out / f"step-{saved.name.rpartition('-')[2]}"
        step.mkdir(exist_ok=True)
        shutil.copyfile(saved / "adapter_model.safetensors", step / "adapter_model.safetensors")
        config = read_json(saved / "adapter_config.json")
        write_json(step / "adapter_config.json", config | {"base_model_name_or_path": str(base)})
    shutil.rmtree(scratch)  # optimiser states
    write_json(out / "history.json", [row for row in trainer.state.log_history if "loss" in row])


def example(chat: Chat, messages: Sequence[Mapping[str, str]]) -> dict[str, list[int]]:
    """Token ids of a chat and its labels: the last answer and the token that ends it."""
    prompt = chat.render([dict(message) for message in messages[:-1]])
    answer = chat.tokenizer(messages[-1]["content"], add_special_tokens=False)["input_ids"]
    eos = chat.tokenizer.eos_token_id
    answer = [*answer, next((end for end in chat.end_ids if end != eos), eos)]
    return {
        "input_ids": [*prompt.ids, *answer],
        "labels": [IGNORED] * len(prompt) + answer,
    }


def collate(rows: Sequence[Mapping[str, list[int]]], pad_id: int) -> dict[str, Tensor]:
    """Right-padded tensors of a batch of examples."""
    width = max(len(row["input_ids"]) for row in rows)

    def padded(name: str, filler: int) -> Tensor:
        return torch.tensor([row[name] + [filler] * (width - len(row[name])) for row in rows])

    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    return {
        "input_ids": padded("input_ids", pad_id),
        "labels": padded("labels", IGNORED),
        "attention_mask": (torch.arange(width)[None] < lengths[:, None]).long(),
    }


def _fingerprint(chats: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps(chats, default=list).encode()).hexdigest()[:16]
