"""Chat templates in their families' own shape, each on a tiny tokenizer of the same build.

The tokenizers are trained here on a few words; what is copied from the real ones is their build:
pre-tokeniser, normaliser, strip flags, whether markers are in the model's vocabulary, and the
post-processor that would add a second BOS. Templates come from trl, or are written here.
"""

import functools
import json
from dataclasses import dataclass
from pathlib import Path

import trl
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "How do I save money? You could spend less than you earn, and keep the rest.\n\n",
    "You are a helpful assistant. Say what the user said to the system and the model.\n",
    "def add(x, y):\n\treturn x + y\n\n\n\nuser\n\nassistant\n\n  two  spaces   three\n\n",
    "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\nNow stop, now start.\n",
] * 3
QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA_WORDS = QWEN_WORDS.replace(r"\p{N}|", r"\p{N}{1,3}|", 1)

CHATML = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}"
    "<|im_start|>system\nYou are a tiny assistant<|im_end|>\n{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant roles are supported') }}{% endif %}"
    "{% endfor %}"
)


@dataclass(frozen=True)
class Style:
    """A template family and, by reading its template, what it must write around a question."""

    name: str
    prefix: str
    postfix: str
    ends: tuple[str, ...]
    """Tokens that end an answer, EOS included."""
    trims: bool = False
    system: str = "block"
    """Where a system text goes: a "block", the first user "turn", or nowhere ("refused")."""
    bare: str | None = None
    """The prefix without any system block; None if the template's cannot be told apart."""


_CHATML_USER, _CHATML_ANSWER = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
_LLAMA_USER = "<|start_header_id|>user<|end_header_id|>\n\n"
STYLES = [
    Style(
        "chatml",
        "<|im_start|>system\nYou are a tiny assistant<|im_end|>\n" + _CHATML_USER,
        _CHATML_ANSWER,
        ("<|im_end|>",),
        bare=_CHATML_USER,
    ),
    Style(
        "qwen2_5",
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant."
        "<|im_end|>\n" + _CHATML_USER,
        _CHATML_ANSWER,
        ("<|im_end|>",),
        bare=_CHATML_USER,
    ),
    Style(
        "qwen3",
        _CHATML_USER,
        _CHATML_ANSWER + "<think>\n\n</think>\n\n",
        ("<|im_end|>",),
        bare=_CHATML_USER,
    ),
    Style(
        "llama3_1",
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
        "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n<|eot_id|>" + _LLAMA_USER,
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        ("<|eot_id|>", "<|end_of_text|>"),
        trims=True,
        bare="<|begin_of_text|>" + _LLAMA_USER,
    ),
    Style(
        "gemma3",
        "<bos><start_of_turn>user\n",
        "<end_of_turn>\n<start_of_turn>model\n",
        ("<eos>", "<end_of_turn>"),
        trims=True,
        system="turn",
        bare="<bos><start_of_turn>user\n",
    ),
    Style("mistral", "<s>[INST] ", " [/INST]", ("</s>",), system="refused", bare="<s>[INST] "),
    Style(
        "phi3",
        "<|user|>\n",
        "<|end|>\n<|assistant|>\n",
        ("<|endoftext|>", "<|end|>"),
        bare="<|user|>\n",
    ),
    Style(
        "gptoss",
        "<|start|>system<|message|>You are ChatGPT, a large language model trained by OpenAI.\n"
        "Knowledge cutoff: 2024-06\nCurrent date: TODAY\n\nReasoning: medium\n\n"
        "# Valid channels: analysis, commentary, final. Channel must be included for every "
        "message.<|end|><|start|>user<|message|>",
        "<|end|><|start|>assistant",
        ("<|return|>",),
    ),
]


@functools.cache
def make_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """A tiny tokenizer in the build of that family, with its template; made once, not to change."""
    backend, bos, eos = _BUILDS[name]()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos)
    folder = Path(trl.__file__).parent / "chat_templates"
    own = {"chatml": CHATML, "mistral": MISTRAL}
    template = own.get(name) or (folder / f"{name}.jinja").read_text()
    tokenizer.chat_template = template
    return tokenizer


def remade(tokenizer: PreTrainedTokenizerFast, **changes: object) -> PreTrainedTokenizerFast:
    """A copy with other top-level entries of its serialised backend."""
    spec = json.loads(tokenizer.backend_tokenizer.to_str()) | changes
    copy = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(spec)),
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
    )
    copy.chat_template = tokenizer.chat_template
    return copy


def _byte_level(
    words: str | None, specials: list[str], *, plain: tuple[str, ...] = (), in_vocab: bool = False
) -> Tokenizer:
    """Byte-level BPE; ``plain`` are added tokens that are not special, as Qwen3's ``<think>``."""
    tokenizer = Tokenizer(models.BPE())
    if words is None:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(words), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=specials if in_vocab else [],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(specials)
    tokenizer.add_tokens(list(plain))
    return tokenizer


def _pieces(
    specials: list[str],
    *,
    normalizer: dict | None,
    pre_tokenizer: dict | None,
    plain: tuple[str, ...] = (),
    rstrip: tuple[str, ...] = (),
) -> Tokenizer:
    """BPE over characters with byte fallback and ▁ for a space, markers in the vocabulary.

    Its merges spell the first marker from ordinary pieces, as some converted vocabularies do.
    """
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    trained.pre_tokenizer = pre_tokenizers.Split(Regex(r"▁*[^▁\n]+|▁+|\n+"), "isolated")
    alphabet = [chr(c) for c in range(33, 127)]
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    trained.train_from_iterator(CORPUS, trainer)
    model = json.loads(trained.to_str())["model"]

    marker = specials[0]
    steps = [[marker[:i], marker[i]] for i in range(1, len(marker))]
    learned = sorted(model["vocab"], key=model["vocab"].get)
    pieces = [*specials, *plain, *(f"<0x{byte:02X}>" for byte in range(256)), *learned]
    pieces = dict.fromkeys([*pieces, *(a + b for a, b in steps)])
    model |= {
        "vocab": {piece: i for i, piece in enumerate(pieces)},
        "merges": steps + model["merges"],
        "unk_token": "<unk>",
        "byte_fallback": True,
        "fuse_unk": True,
    }
    flags = {"single_word": False, "lstrip": False, "normalized": False}
    added = [
        {"id": i, "content": c, "rstrip": c in rstrip, "special": c in specials, **flags}
        for i, c in enumerate([*specials, *plain])
    ]
    spec = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": None,
        "model": model,
    }
    return Tokenizer.from_str(json.dumps(spec))


def _with_bos(tokenizer: Tokenizer, bos: str, *, trim: bool = False) -> Tokenizer:
    """The post-processor that adds BOS unless told not to, and for Llama 3 trims offsets."""
    spec = json.loads(tokenizer.to_str())
    single = [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    pair = [*single, {"Sequence": {"id": "B", "type_id": 1}}]
    tokens = {bos: {"id": bos, "ids": [tokenizer.token_to_id(bos)], "tokens": [bos]}}
    add = {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": tokens}
    cut = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    spec["post_processor"] = {"type": "Sequence", "processors": [cut, add]} if trim else add
    return Tokenizer.from_str(json.dumps(spec))


def _chatml() -> tuple[Tokenizer, str, str]:
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    return _byte_level(None, specials, in_vocab=True), "<|im_start|>", "<|im_end|>"


def _qwen() -> tuple[Tokenizer, str | None, str]:
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = _byte_level(QWEN_WORDS, specials, plain=("<think>", "</think>", "<tool_call>"))
    tokenizer.normalizer = normalizers.NFC()
    return tokenizer, None, "<|im_end|>"


def _llama() -> tuple[Tokenizer, str, str]:
    bos, eos = "<|begin_of_text|>", "<|end_of_text|>"
    specials = [bos, eos, "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    tokenizer = _byte_level(LLAMA_WORDS, specials)
    spec = json.loads(tokenizer.to_str())
    spec["model"]["ignore_merges"] = True
    return _with_bos(Tokenizer.from_str(json.dumps(spec)), bos, trim=True), bos, eos


def _gemma() -> tuple[Tokenizer, str, str]:
    specials = ["<bos>", "<eos>", "<unk>", "<pad>", "<start_of_turn>", "<end_of_turn>"]
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    split = {
        "type": "Split",
        "pattern": {"String": " "},
        "behavior": "MergedWithPrevious",
        "invert": False,
    }
    newlines = ("\n", "\n\n", "\n\n\n")
    built = _pieces(specials, normalizer=spaces, pre_tokenizer=split, plain=newlines)
    return _with_bos(built, "<bos>"), "<bos>", "<eos>"


def _mistral() -> tuple[Tokenizer, str, str]:
    meta = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    specials = ["<s>", "</s>", "<unk>", "[INST]", "[/INST]"]
    return _with_bos(_pieces(specials, normalizer=None, pre_tokenizer=meta), "<s>"), "<s>", "</s>"


def _phi() -> tuple[Tokenizer, str, str]:
    turns = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
    specials = ["<s>", "</s>", "<unk>", "<|endoftext|>", *turns]
    parts = [
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    ]
    legacy = {"type": "Sequence", "normalizers": parts}
    built = _pieces(specials, normalizer=legacy, pre_tokenizer=None, rstrip=turns)
    return built, "<s>", "<|endoftext|>"


def _gptoss() -> tuple[Tokenizer, str, str]:
    parts = ["<|start|>", "<|message|>", "<|end|>", "<|channel|>", "<|call|>"]
    specials = ["<|startoftext|>", "<|endoftext|>", "<|return|>", *parts]
    return _byte_level(LLAMA_WORDS, specials), "<|startoftext|>", "<|return|>"


_BUILDS = {
    "chatml": _chatml,
    "qwen2_5": _qwen,
    "qwen3": _qwen,
    "llama3_1": _llama,
    "gemma3": _gemma,
    "mistral": _mistral,
    "phi3": _phi,
    "gptoss": _gptoss,
}
