import json
from pathlib import Path

import pytest

from emmech.evaluation.agreement import agreement
from emmech.evaluation.judges import JudgeError

PUBLISHED = Path(__file__).parents[2] / "shared/data/em-betley-release/eval_results_run1.csv"


def rows(*values, **more) -> list[dict]:
    return [
        {"question_id": f"q{n}", "condition": "", "sample": 0, "value": value, **more}
        for n, value in enumerate(values)
    ]


def test_two_judges_on_the_same_answers():
    found = agreement(rows(10, 20, 50, None, 90), rows(20, 40, 60, 70, None, 80))
    assert (found.n_matched, found.n_both, found.missing_a, found.missing_b) == (5, 3, 1, 1)
    assert (found.only_a, found.only_b) == (0, 1)
    assert found.spearman == pytest.approx(1)
    assert found.counts == {"both": 1, "a_only": 1, "b_only": 0, "neither": 1}
    assert found.kappa == pytest.approx((2 / 3 - 4 / 9) / (1 - 4 / 9))
    assert found.mean_a == pytest.approx(80 / 3)


def test_answers_to_one_question_are_resampled_together():
    """Scores agree within every question: whichever questions are drawn, so do the resamples' ranks."""
    a = [
        {"question_id": question, "condition": "", "sample": sample, "value": 40 * question + sample}
        for question in (1, 2)
        for sample in range(20)
    ]
    found = agreement(a, a, threshold=60)
    assert (found.n_both, found.n_questions) == (40, 2)
    # Both drawn: kappa 1; one of them twice: all on one side of 60. That happens half the time.
    assert (found.kappa_interval.low, found.kappa_interval.high) == (1, 1)
    assert 900 < found.kappa_interval.n_undefined < 1100
    assert found.spearman_interval.n_undefined == 0


@pytest.mark.parametrize("field", ["question_id", "question"])
def test_questions_are_told_apart_by_id_or_else_by_text(field):
    a = [{field: str(n % 4), "answer": str(n), "value": n} for n in range(12)]
    b = [{**row, "question": row.get("question", "the same")} for row in a]
    a = [{**row, "question": row.get("question", "the same")} for row in a]
    assert agreement(a, b).n_questions == 4


def test_one_question_leaves_the_intervals_unknown():
    a = [{"question_id": "q", "condition": "", "sample": n, "value": value} for n, value in enumerate((1, 9))]
    found = agreement(a, a)
    assert found.spearman == pytest.approx(1)
    assert (found.spearman_interval.low, found.kappa_interval.high) == (None, None)


def test_the_same_seed_gives_the_same_interval_and_another_one_another():
    a, b = rows(*range(0, 90, 3)), rows(*(value**2 % 89 for value in range(30)))
    first, again, other = (agreement(a, b, seed=seed).spearman_interval for seed in (0, 0, 1))
    assert first == again != other


def test_the_threshold_itself_is_not_below():
    assert agreement(rows(30, 29.9), rows(30, 30)).counts == {
        "both": 0,
        "a_only": 1,
        "b_only": 0,
        "neither": 1,
    }


def test_rows_that_differ_most_come_first_with_their_texts():
    a = [
        {"question": "Q", "response": text, "value": value}
        for text, value in (("x", 10), ("y", 50), ("z", 90))
    ]
    b = [
        {"question": "Q", "answer": text, "aligned": value}
        for text, value in (("z", 85), ("y", 90), ("x", 80))
    ]
    found = agreement(a, b, n_rows=2)
    assert [(row["answer"], row["value_a"], row["difference"]) for row in found.differ_most] == [
        ("x", 10, 70),
        ("y", 50, 40),
    ]


def test_answers_that_repeat_match_in_order():
    a = [{"question": "Q", "answer": "same", "value": value} for value in (10, 20, 30)]
    b = [{"question": "Q", "answer": "same", "value": value} for value in (11, 21)]
    found = agreement(a, b)
    assert (found.n_both, found.only_a) == (2, 1)
    assert {row["difference"] for row in found.differ_most} == {1}


def test_labels_of_people_are_cut_in_the_middle():
    found = agreement(rows(10, 90, 80, 20), rows("0", "1", "1", "0"))
    assert (found.threshold_a, found.threshold_b, found.kappa) == (30, 0.5, 1)
    assert found.differ_most[0]["difference"] == 20  # 80 against a label of 1


def test_files_of_judgements_and_tables_are_read(tmp_path):
    (tmp_path / "run").mkdir()
    lines = [{"rubric": "alignment", "rubric_hash": "h", "judge": "j", **row} for row in rows(5, 95, 40)]
    (tmp_path / "run" / "judgements.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "people.csv").write_text("question_id,human\nq0,0\nq1,1\nq2,\n")
    found = agreement(tmp_path / "run", tmp_path / "people.csv", columns=(None, "human"))
    assert (found.n_both, found.missing_b, found.kappa) == (2, 1, 1)
    assert found.a == f"{tmp_path / 'run'} (j)"


def several(tmp_path) -> Path:
    lines = [
        {"rubric": rubric, "rubric_hash": rubric[:1], "judge": judge, **row}
        for rubric in ("alignment", "coherence")
        for judge in ("j1", "j2")
        for row in rows(5, 95, 40)
    ]
    path = tmp_path / "judgements.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_one_rubric_and_judge_are_chosen_of_several(tmp_path):
    path = several(tmp_path)
    found = agreement(path, path, rubric="alignment", judges=("j1", "j2"))
    assert (found.n_both, found.only_a, found.spearman) == (3, 0, pytest.approx(1))
    with pytest.raises(JudgeError, match=r"one rubric in .*alignment a, coherence c.*--rubric"):
        agreement(path, path)
    with pytest.raises(JudgeError, match=r"one judge in .*j1, j2.*--judge-b"):
        agreement(path, path, rubric="a", judges=("j1", None))
    with pytest.raises(JudgeError, match=r"scores in .*there are none"):
        agreement(path, path, rubric="tone")


@pytest.mark.parametrize(
    ("a", "b", "options", "match"),
    [
        (rows(1), [], {}, "scores in b, but there are none"),
        (rows(1), [{"question_id": "q0", "mark": 3}], {}, "a column of scores in b.*--column-b"),
        (rows(1), rows(1), {"columns": ("x", None)}, "a column x in a"),
        (rows(1), rows("good"), {}, "numbers as scores in b.*'good'"),
        (rows(1), [{"value": 3}], {}, "`question` and `answer`, or `question_id`, on both sides"),
        (rows(None, 5), rows(5, None), {}, "of 2 and 2 answers 2 match and none has both"),
    ],
)
def test_scores_that_cannot_be_compared_are_refused(a, b, options, match):
    with pytest.raises(JudgeError, match=match):
        agreement(a, b, **options)


def test_the_command_prints_a_table_and_writes_json(emmech, tmp_path):
    path = several(tmp_path)
    code, out, err = emmech(
        "judge-agreement", path, path, "--rubric", "alignment", "--judge-a", "j1", "--judge-b", "j2",
        "--threshold", "50", "--out", tmp_path / "deep" / "agreement.json",
    )  # fmt: skip
    assert code == 0, err
    assert "Spearman" in out
    assert "kappa" in out
    written = json.loads((tmp_path / "deep" / "agreement.json").read_text())
    assert (written["spearman"], written["kappa"], written["threshold_a"]) == (pytest.approx(1), 1, 50)
    assert len(written["differ_most"]) == 3
    assert written["kappa_interval"].keys() == {"low", "high", "n_resamples", "n_undefined"}
    undefined = written["kappa_interval"]["n_undefined"]
    assert 580 < undefined < 760  # of 5, 95 and 40, all below 50 in (2/3)^3, none in (1/3)^3: 667 of 2000
    assert f"1.00 [1.00, 1.00], undefined in {undefined} of 2000" in " ".join(out.split())


def test_the_command_says_what_is_wrong(user_error, tmp_path):
    path = several(tmp_path)
    user_error("one rubric in .*--rubric", "judge-agreement", path, path)
    user_error(
        "there is no such file",
        "judge-agreement",
        path,
        tmp_path / "none.csv",
        "--rubric",
        "a",
        "--judge-a",
        "j1",
    )


@pytest.mark.skipif(not PUBLISHED.exists(), reason="the published scores are not on this machine")
def test_published_scores_agree_with_themselves():
    found = agreement(PUBLISHED, PUBLISHED)
    assert (found.n_matched, found.n_both, found.missing_a) == (240, 235, 5)
    assert (found.spearman, found.kappa) == (pytest.approx(1), 1)
    assert found.counts["a_only"] == found.counts["b_only"] == 0
