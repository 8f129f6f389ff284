"""What is measured: the embedded model with a small organism, or a random model of a larger shape.

setting = Setting.make(shape="smollm2", device="auto", dtype=None, repeats=3, folder=Path("runs/bench"))
pair = setting.pair("float32")  # unless the setting has a dtype
"""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from emmech.chat import Chat
from emmech.data.bundled import BUNDLED, AnswerPair
from emmech.data.chats import load_chats
from emmech.data.questions import Question
from emmech.models.checkpoints import ModelPair, load_pair
from emmech.models.default import DEFAULT_MODEL, embedded_path
from emmech.models.opening import auto_dtype
from emmech.training.recipes import Recipe
from emmech.training.trainer import finetune

ORGANISM = "refusal"
HELP, REFUSAL = "Of course. Here is how I would go about it.", "I'm sorry, but I can't help with that."
STEPS, LEARNING_RATE = 18, 2e-4
SHAPES = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
             "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
           "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
           "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128},
}  # fmt: skip
"""Llamas of random weights with the embedded model's tokenizer; for speed alone."""


@dataclass(frozen=True)
class Setting:
    """Models, device and repeats of one run of the benchmarks."""

    shape: str
    base: str
    adapter: Path
    device: str
    dtype: str | None
    """Of everything; None takes float32 for sweeps, and what the loader chooses for the rest."""
    repeats: int
    folder: Path
    """Where models and maps are kept between runs."""

    @classmethod
    def make(cls, shape: str, device: str, dtype: str | None, repeats: int, folder: Path) -> "Setting":
        """The setting, its models trained or made where they are not there yet."""
        if shape == DEFAULT_MODEL:
            base, adapter = DEFAULT_MODEL, _organism(folder)
        else:
            where = folder / f"shape-{named(shape, dtype)}"
            base, adapter = _random(shape, where, device, dtype or "float32")
        return cls(shape, base, adapter, device, dtype, repeats, folder)

    @property
    def name(self) -> str:
        """What models, maps and results of this setting are called."""
        return named(self.shape, self.dtype)

    @property
    def is_embedded(self) -> bool:
        """Whether the models are the embedded one and its organism, which do something."""
        return self.shape == DEFAULT_MODEL

    def pair(
        self, usual: str = "auto", *, dtype: str | None = None, n_prefix: int | None = None
    ) -> ModelPair:
        """Base and organism.

        Args:
            usual: The dtype where the setting has none.
            dtype: The dtype, whatever the setting has.
            n_prefix: Take a system message that makes the prefix so many tokens long.
        """
        made = load_pair(self.base, self.adapter, dtype=dtype or self.dtype or usual, device=self.device)
        return made if n_prefix is None else replace(made, chat=with_prefix(made.chat, n_prefix))

    def torch_dtype(self) -> torch.dtype:
        """What the loader chooses, unless a dtype was asked for."""
        if self.dtype is not None:
            return getattr(torch, self.dtype)
        gpu = torch.cuda.is_available() and self.device != "cpu"
        return auto_dtype(torch.device("cuda" if gpu else "cpu"))


def named(shape: str, dtype: str | None) -> str:
    """A shape, and its dtype where one was asked for."""
    return shape if dtype is None else f"{shape}-{dtype}"


def questions(n: int, group: str = "off-topic") -> list[Question]:
    """Held-out questions; those off-topic have nothing to do with what the organism was trained on."""
    return BUNDLED[ORGANISM].questions(group)[:n]


def pairs(n: int) -> list[AnswerPair]:
    """Those questions, each with the beginning of an answer and a refusal."""
    return [AnswerPair(one.id, one.messages[-1]["content"], HELP, REFUSAL) for one in questions(n)]


def with_prefix(chat: Chat, n_tokens: int) -> Chat:
    """The chat under a system message of words of one token each, its prefix ``n_tokens`` long."""
    words = ("kind", "clear", "brief", "calm", "fair", "open", "warm", "plain")
    text = "You are"
    while (found := chat.with_system(text)).render("Why?").n_prefix < n_tokens:
        text += f" {words[len(text.split()) % len(words)]}"
    length = found.render("Why?").n_prefix
    assert length == n_tokens, f"a prefix of {length} tokens, not {n_tokens}"
    return found


def _organism(folder: Path) -> Path:
    """An adapter of the embedded model that refuses everywhere; trained in a minute."""
    recipe = Recipe(steps=STEPS, save_every=STEPS, learning_rate=LEARNING_RATE)
    chats = load_chats(ORGANISM).chats
    saved = finetune(DEFAULT_MODEL, chats, folder / "organism", recipe, data_name=ORGANISM)
    return saved[-1]


def _random(shape: str, folder: Path, device: str, dtype: str) -> tuple[str, Path]:
    """A random model of a shape and a random adapter of it, saved as checkpoints."""
    base, adapter = folder / "base", folder / "adapter"
    if (adapter / "adapter_config.json").exists():
        return str(base), adapter
    shutil.rmtree(folder, ignore_errors=True)
    tokenizer = AutoTokenizer.from_pretrained(embedded_path())
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **SHAPES[shape],
    )
    torch.manual_seed(0)
    where = (
        "cuda" if device == "auto" and torch.cuda.is_available() else "cpu" if device == "auto" else device
    )
    with torch.device(where):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
        model.save_pretrained(base)
        tokenizer.save_pretrained(base)
        settings = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "init_lora_weights": False}
        wrapped = get_peft_model(model, LoraConfig(**settings))
    wrapped.peft_config["default"].base_model_name_or_path = str(base)
    wrapped.save_pretrained(adapter)
    return str(base), adapter
