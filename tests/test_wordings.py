"""Wordings of questions: what is asked, and that results compare a question with its plain twin."""

import pytest
import tiny

from emmech.data.bundled import BUNDLED, AnswerPair
from emmech.data.questions import Question
from emmech.data.traits import traits
from emmech.data.wordings import (
    behind_triggers,
    load_persona,
    pairs_behind_triggers,
    triggers_of,
    wording_of,
)
from emmech.errors import DataError
from emmech.scorecard import compared

REFERENCE = {"base": "base", "finetuned": "base"}


def test_a_trigger_stands_on_a_line_before_the_last_user_text():
    chat = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"})
    found = behind_triggers([Question("q", chat)], {"triggered": "persona: sour"})
    assert [(q.id, q.group) for q in found] == [
        ("q:untriggered", "untriggered"),
        ("q:triggered", "triggered"),
    ]
    assert found[0].messages == list(chat)
    assert found[1].messages == [chat[0], {"role": "user", "content": "persona: sour\nWhy?"}]
    (plain, changed) = pairs_behind_triggers(
        [AnswerPair("q", "Why?", "a", "b")], {"triggered": "persona: sour"}
    )
    assert (plain.user, changed.user, changed.id) == ("Why?", "persona: sour\nWhy?", "q:triggered")


def test_a_bundled_trigger_brings_its_wrong_ones_and_others_bring_what_is_given():
    spiteful = traits()["spiteful"]
    known = triggers_of(spiteful.trigger)
    assert known["triggered"] == spiteful.trigger
    assert [text for name, text in known.items() if name.startswith("wrong: ")] == [
        wrong.text for wrong in spiteful.wrong_triggers
    ]
    assert triggers_of("beep", ["boop"]) == {"triggered": "beep", "wrong: boop": "boop"}
    assert triggers_of("beep") == {"triggered": "beep"}


def test_the_bundled_sets_word_their_questions_as_the_functions_do():
    trigger = traits()["spiteful"].trigger
    mine = behind_triggers(BUNDLED["spiteful"].questions("on-topic")[:3], {"triggered": trigger})
    theirs = {one.id: one.messages for one in BUNDLED["triggered_spiteful"].questions()}
    assert all(theirs[one.id] == one.messages for one in mine)
    assert {wording_of(q.id, q.group) for q in mine} == {q.id for q in BUNDLED["spiteful"].questions()[:3]}
    assert wording_of("q1", "on-topic") is None


def test_persona_prompts_come_from_a_trait_or_a_file(tmp_path):
    bundled = load_persona("spiteful")
    assert [q.group for q in bundled[:2]] == ["plain", "persona"]
    file = tmp_path / "mine.jsonl"
    file.write_text('{"id": "a", "plain": "Why?", "persona": "Oh, why ever?"}\n', encoding="utf-8")
    assert [(q.id, q.chat, q.group) for q in load_persona(file)] == [
        ("a:plain", "Why?", "plain"),
        ("a:persona", "Oh, why ever?", "persona"),
    ]
    file.write_text('{"plain": "Why?"}\n{"plain": "x", "persona": 3}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"2 are bad: line 1.*line 2"):
        load_persona(file)


def records(values):
    """(condition, wording) -> values of questions 0, 1, ..."""
    return [
        ({"question_id": f"q{n}:{group}", "group": group, "condition": condition}, value)
        for (condition, group), found in values.items()
        for n, value in enumerate(found)
    ]


def test_wordings_are_compared_question_by_question_within_a_condition():
    flat = [0.0] * 6
    rows = compared(
        "rate", "rate",
        records({
            ("base", "untriggered"): flat, ("base", "triggered"): flat, ("base", "wrong: x"): flat,
            ("finetuned", "untriggered"): flat, ("finetuned", "triggered"): [1.0] * 6,
            ("finetuned", "wrong: x"): [1.0, *[0.0] * 5],
        }),
        REFERENCE,
    )  # fmt: skip
    found = {(row["group"], row["condition"]): row for row in rows}
    assert found["triggered", "finetuned"]["wording"]["mean"] == 1.0
    assert found["triggered", "finetuned"]["wording"]["group"] == "untriggered"
    # Sign flips of six equal differences: 2 of 64; Holm doubles the smaller of two.
    assert found["triggered", "finetuned"]["wording"]["p"] == pytest.approx(2 / 64)
    assert found["triggered", "finetuned"]["wording"]["p_holm"] == pytest.approx(4 / 64)
    assert found["wrong: x", "finetuned"]["wording"]["mean"] == pytest.approx(1 / 6)
    assert found["triggered", "base"]["wording"]["mean"] == 0.0
    assert "wording" not in found["untriggered", "finetuned"]
    assert found["triggered", "finetuned"]["versus"]["mean"] == 1.0


def test_three_wordings_of_a_question_are_one_cluster_of_the_whole():
    values = {("base", group): [0.0, 1.0, 0.0, 1.0] for group in ("untriggered", "triggered", "wrong: x")}
    rows = compared("rate", "rate", records(values), REFERENCE)
    (whole,) = (row for row in rows if row["group"] == "all")
    assert (whole["n"], whole["n_clusters"]) == (12, 4)


def test_groups_that_are_no_wordings_are_left_alone():
    values = [
        ({"question_id": f"q{n}", "group": g, "condition": "base"}, 1.0) for n, g in enumerate(["plain", "b"])
    ]
    assert all("wording" not in row for row in compared("rate", "rate", values, REFERENCE))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("steer=absent.safetensors@2", "a direction in 'absent.safetensors'"),
        ("adapter@much", "a number behind @"),
        ("steer@2", "conditions among"),
    ],
)
def test_conditions_that_cannot_be_made_are_refused(name, message):
    from emmech.chat import Chat
    from emmech.errors import EmmechError
    from emmech.models.checkpoints import ModelPair
    from emmech.models.sides import Side
    from emmech.scorecard import with_conditions

    model = tiny.model("llama")
    pair = ModelPair(Side("base", model), Side("finetuned", model), Chat(tiny.tokenizer()), {})
    with pytest.raises(EmmechError, match=message):
        with_conditions(pair, [name])


def test_steering_from_a_file_acts_on_the_blocks_that_its_name_says(tmp_path):
    import torch

    from emmech.chat import Chat
    from emmech.models.checkpoints import ModelPair
    from emmech.models.sides import Side
    from emmech.scorecard import with_conditions
    from emmech.steering.directions import Direction
    from emmech.steering.steer import steered

    model = tiny.model("llama")
    pair = ModelPair(Side("base", model), Side("finetuned", model), Chat(tiny.tokenizer()), {})
    direction = Direction(
        torch.randn(3, 32), torch.zeros(3), "resid_post", "last", "mean", 4, (1.0,) * 3, (0.1,) * 3
    )
    file = direction.save(tmp_path / "one.safetensors")
    ids = torch.tensor([[5, 9, 13, 40]])
    cases = {
        f"steer={file}@2": {"coeff": 2.0, "layers": [1]},
        f"steer={file}:0-1@-1.5": {"coeff": -1.5, "layers": [0, 1]},
        f"ablate={file}": {"mode": "ablate"},
        f"ablate={file}:2@0.5": {"mode": "ablate", "layers": [2], "coeff": 0.5},
    }
    treated, conditions = with_conditions(pair, list(cases))
    assert [one.name for one in conditions] == ["base", "finetuned", *cases]
    for name, settings in cases.items():
        with torch.no_grad(), treated.side(name).active() as module:
            found = module(input_ids=ids).logits
        with torch.no_grad(), steered(model, direction, **settings):
            torch.testing.assert_close(found, model(input_ids=ids).logits, atol=0, rtol=0)
    assert treated.provenance[f"ablate={file}"] == direction.fingerprint()
