"""The demo organism's training: loss where it belongs, steps saved, nothing done twice."""

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from emmech.chat import Chat
from emmech.errors import RunError
from emmech.models.checkpoints import load_pair
from emmech.training import trainer
from emmech.training.trainer import IGNORED, Recipe, collate, example, finetune, history

ANSWER = "I will not say."
CHATS = [
    ({"role": "user", "content": question}, {"role": "assistant", "content": ANSWER})
    for question in tiny.QUESTIONS
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    base = tiny.save_base("llama", folder / "base")
    recipe = Recipe(steps=6, save_every=2, learning_rate=1e-2, batch_size=2, rank=4, alpha=8)
    adapters = finetune(str(base), CHATS, folder / "organism", recipe, progress=False)
    return base, folder / "organism", recipe, adapters


def test_loss_is_on_the_answer_and_its_end_only():
    chat = Chat(tiny.tokenizer())
    for messages in CHATS:
        row = example(chat, messages)
        learned = [label for label in row["labels"] if label != IGNORED]
        assert chat.tokenizer.decode(learned) == ANSWER + "<|im_end|>"
        prompt = chat.render(messages[0]["content"])
        assert row["input_ids"] == [*prompt.ids, *learned]
        assert row["labels"][: len(prompt)] == [IGNORED] * len(prompt)


def test_padding_carries_no_loss_and_is_masked():
    rows = [{"input_ids": [5, 6, 7], "labels": [IGNORED, 6, 7]}, {"input_ids": [8], "labels": [8]}]
    batch = collate(rows, pad_id=0)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORED, 6, 7], [8, IGNORED, IGNORED]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


def test_every_saved_step_is_an_adapter_of_the_base_that_learned_more(trained):
    base, out, _, adapters = trained
    assert [folder.name for folder in adapters] == ["step-2", "step-4", "step-6"]
    chat = Chat(tiny.tokenizer())
    pristine = AutoModelForCausalLM.from_pretrained(base)
    batch = collate([example(chat, messages) for messages in CHATS], 0)
    with torch.no_grad():
        losses = [float(pristine(**batch).loss)]
    for folder in adapters:
        pair = load_pair(base, folder, dtype="float32", device="cpu")
        assert pair.one_copy
        with pair.finetuned.active() as model, torch.no_grad():
            losses.append(float(model(**batch).loss))
    assert losses == sorted(losses, reverse=True), losses
    assert len(history(out)) == 6


def test_a_finished_run_is_not_trained_again_and_other_arguments_are_refused(trained, monkeypatch):
    base, out, recipe, adapters = trained
    monkeypatch.setattr(trainer, "_train", lambda *_: pytest.fail("trained again"))
    assert finetune(str(base), CHATS, out, recipe, progress=False) == adapters
    with pytest.raises(RunError, match="recipe"):
        finetune(str(base), CHATS, out, Recipe(steps=6, save_every=2), progress=False)
    with pytest.raises(RunError, match="chats"):
        finetune(str(base), CHATS[:3], out, recipe, progress=False)
