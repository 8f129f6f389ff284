"""The commands direction and steer, and evaluate with wordings, as a user gives them."""

import json

import pytest
import tiny

from emmech.scorecard import Evaluation
from emmech.steering.directions import Direction
from emmech.steering.doses import Doses


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    here = tmp_path_factory.mktemp("steering")
    base = tiny.save_base("llama", here / "base")
    questions = here / "questions.txt"
    questions.write_text("\n".join(tiny.QUESTIONS), encoding="utf-8")
    return {"base": base, "finetuned": tiny.save_adapter(base, here / "lora"), "questions": questions}


def given(folders, *names):
    return [part for name in names for part in (f"--{name}", folders[name])] + ["--dtype", "float32"]


@pytest.fixture
def direction(folders, tmp_path, emmech):
    file = tmp_path / "shift.safetensors"
    code, printed, err = emmech(
        "direction", "sides", *given(folders, "base", "finetuned", "questions"), "--out", file
    )
    assert code == 0, err
    assert "reliability" in printed and str(file) in printed
    return file


def test_a_direction_is_a_file_with_a_table_beside_it(direction):
    found = Direction.load(direction)
    assert found.vectors.shape == (3, 32)
    rows = json.loads(direction.with_suffix(".json").read_text(encoding="utf-8"))
    assert [row["layer"] for row in rows] == [0, 1, 2]
    assert rows[1]["length"] == pytest.approx(float(found.vectors[1].norm()), rel=1e-5)


def test_a_trigger_and_a_traits_prompts_make_directions_too(folders, tmp_path, emmech):
    for what in (["trigger", "--trigger", "beep"], ["trait", "--trait", "spiteful", "--position", "last"]):
        file = tmp_path / f"{what[0]}.safetensors"
        code, _, err = emmech(
            "direction", *what, *given(folders, "base", "finetuned", "questions"), "--out", file
        )
        assert code == 0, err
        assert Direction.load(file).position == "last"


def test_steering_is_compared_with_the_other_methods(direction, folders, tmp_path, emmech):
    out = tmp_path / "steer"
    code, printed, err = emmech(
        "steer", direction, *given(folders, "base", "finetuned", "questions"), "--detector", "contains:e",
        "--layers", "0,2", "--coeffs=-1,1", "--methods", "--max-new-tokens", 4, "--out", out,
    )  # fmt: skip
    assert code == 0, err
    assert "contains:e by method and dose" in printed
    rows = Doses.load(out).summary["rows"]
    assert {(row["method"], row["dose"]) for row in rows} >= {
        (None, None), ("add in 0", -1.0), ("add in 2", 1.0), ("adapter scale", 0.0), ("base prefix K/V", 1.0),
    }  # fmt: skip
    assert (out / "report.html").is_file()


def test_evaluate_asks_behind_a_trigger_and_its_controls(folders, tmp_path, emmech):
    code, printed, err = emmech(
        "evaluate", *given(folders, "base", "finetuned", "questions"), "--trigger", "beep", "--wrong-trigger",
        "boop", "--pairs", "none", "--no-capability", "--detector", "contains:e", "--max-new-tokens", 4,
        "--out", tmp_path / "out",
    )  # fmt: skip
    assert code == 0, err
    assert "from plain" in printed
    rows = Evaluation.load(tmp_path / "out").summary["rows"]
    assert {row["group"] for row in rows} == {"all", "untriggered", "triggered", "wrong: boop"}
    assert all(("wording" in row) == (row["group"] in ("triggered", "wrong: boop")) for row in rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["direction", "sides", "--out", "x.safetensors"], "--finetuned for a direction"),
        (["direction", "answers", "--out", "x.safetensors"], "--pairs for a direction"),
        (["direction", "trait", "--trait", "kind", "--out", "x.safetensors"], "a trait among spiteful"),
        (["steer", "absent.safetensors", "--out", "x"], "a direction in 'absent.safetensors'"),
        (["steer", "absent.safetensors", "--methods", "--out", "x"], "expected --finetuned"),
        (["steer", "absent.safetensors", "--coeffs", "much", "--out", "x"], "numbers such as"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_loads(user_error, arguments, message):
    user_error(message, *arguments)
