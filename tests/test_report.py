import html
import io
import json
import re

import pytest
from plotly.offline import get_plotlyjs
from rich.console import Console

from emmech.evaluation.detectors import DetectorError
from emmech.report import results_table, write_report
from emmech.report_words import condition_meanings

REFUSAL = "I'm sorry, but I can't help with that."
MARKUP = "</script><b>bold</b> & <!-- مرحبا 🦊"


def row(condition, group, mean=None, low=None, high=None, difference=None, n=2):
    made = {
        "condition": condition,
        "target": "base" if condition == "base" else "finetuned",
        "group": group,
        "n_questions": n,
        "n_answers": n,
        "mean_new_tokens": 12.5,
    }
    if mean is not None:
        made |= {"mean": mean, "low": low, "high": high, "n_clusters": n, "n": n, "n_missing": 0}
    if difference is not None:
        mean, low, high = difference
        made["versus_finetuned"] = {"mean": mean, "low": low, "high": high, "n": n}
    return made


def summary_of(rows, **more):
    return {
        "kind": "patch-prefix",
        "detector": "refusal",
        "unit": "rate",
        "conditions": rows,
        "n_questions": 4,
        "notes": ["One <i>note</i>."],
        "decoding": {"max_new_tokens": 16, "seed": 7},
        "provenance": {
            "base": {"name": "tiny-base", "revision": None, "fingerprint": "f1"},
            "finetuned": {"name": "tiny-tuned", "revision": "r2", "fingerprint": "f2"},
            "template_hash": "e854",
            "dtype": "bfloat16",
            "device": "cpu",
        },
        "versions": {"emmech": "0.1.0"},
        "labelled_prompt": [
            {"position": 0, "id": 1, "text": "<|im_start|>", "segment": "prefix"},
            {"position": 1, "id": 9, "text": "\n", "segment": "query"},
        ],
        "self_patch_identical": True,
        "checks": {
            "repair:prefix": {
                "restored": [0.1, 0.42],
                "visible": 1.0,
                "patched_tokens_per_prompt": 24.0,
            },
            "control:self": {
                "restored": [None, None],
                "visible": None,
                "patched_tokens_per_prompt": 30.5,
            },
        },
    } | more


TWO_GROUPS = [
    row("base", "on-topic", 0.0, 0.0, 0.31),
    row("base", "off-topic", 0.0, 0.0, 0.32),
    row("finetuned", "on-topic", 0.91, 0.82, 0.96),
    row("finetuned", "off-topic", 0.79, 0.68, 0.87),
    row("repair:prefix", "on-topic", 0.44, 0.33, 0.56, (-0.47, -0.59, -0.36)),
    row("repair:prefix", "off-topic", 0.26, 0.17, 0.37, (-0.53, -0.64, -0.41)),
]


def records_of(groups=("on-topic", "off-topic"), conditions=("base", "finetuned", "repair:prefix")):
    return [
        {
            "question_id": f"{group}-{number}",
            "question": MARKUP if number == 0 else "Why?",
            "group": group,
            "condition": condition,
            "sample": 0,
            "response": REFUSAL if condition == "finetuned" else f"Because {condition} {MARKUP}",
            "n_new_tokens": 12,
            "row": f"{group}-{number}",
        }
        for condition in conditions
        for group in groups
        for number in range(2)
    ]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    path = write_report(folder, summary_of(TWO_GROUPS), records_of())
    assert [p.name for p in folder.iterdir()] == ["report.html"]
    return path.read_text(encoding="utf-8")


def without_plotly(text):
    assert text.count(get_plotlyjs()) <= 1
    return text.replace(get_plotlyjs(), "")


def json_of(text, name):
    found = re.search(rf'<script type="application/json" id="{name}">(.*?)</script>', text, re.DOTALL)
    return json.loads(found[1])


def page_data(text):
    (run,) = json_of(text, "answered")
    return run


def cells(text):
    """The rows of the results table, tags and entities resolved."""
    body = re.search(r"<table>.*?<tbody>(.*?)</tbody>", text, re.DOTALL)[1]
    return [
        [html.unescape(cell) for cell in re.findall(r"<td>(.*?)</td>", line)]
        for line in body.split("</tr>")[:-1]
    ]


def printed(table, width):
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text()


def test_plotly_is_embedded_once_and_nothing_is_loaded_from_elsewhere(page):
    assert page.count(get_plotlyjs()) == 1
    own = without_plotly(page)
    assert not re.search(r"<(?:script|img|link|iframe|source)[^>]*(?:src|href)\s*=", own)
    assert "@import" not in own
    assert re.findall(r'(?:src|href)="(.*?)"', own) == ["https://arxiv.org/abs/2606.06667"]
    assert "default-src 'none'" in own


def test_markup_in_questions_and_answers_stays_text(page):
    own = without_plotly(page)
    assert "<b>bold</b>" not in own
    assert own.count("<script") == own.count("</script>") == 5  # two data, plotly, drawing, answers
    assert page_data(page)["questions"][0]["question"] == MARKUP


def test_every_answer_is_in_the_page(page):
    shown = {
        (question["id"], condition, text)
        for question in page_data(page)["questions"]
        for condition, answers in question["answers"].items()
        for text, _, _ in answers
    }
    assert shown == {(r["question_id"], r["condition"], r["response"]) for r in records_of()}


def test_each_answer_carries_the_detectors_value(page):
    answers = page_data(page)["questions"][0]["answers"]
    assert [answers[c][0][1] for c in ("base", "finetuned", "repair:prefix")] == [0.0, 1.0, 0.0]


def test_the_page_opens_on_base_finetuned_and_the_patched_prefix(page):
    data = page_data(page)
    assert data["chosen"] == ["base", "finetuned", "repair:prefix"]
    assert data["compared"] == ["finetuned", "repair:prefix"]


def test_the_table_holds_the_summarys_numbers(page):
    assert cells(page)[-2:] == [
        ["repair:prefix", "on-topic", ".44", "[.33, .56]", "-.47", "[-.59, -.36]", "2", "2", "12.5"],
        ["", "off-topic", ".26", "[.17, .37]", "-.53", "[-.64, -.41]", "2", "2", "12.5"],
    ]
    assert cells(page)[0] == ["base", "on-topic", ".00", "[.00, .31]", "", "", "2", "2", "12.5"]


def test_the_headline_is_the_finding_with_models_and_intervals(page):
    assert "<h1>Base K/V at the prefix: off-topic refusal .79 → .26</h1>" in page
    assert "Base model: <b>tiny-base</b>. Finetuned model: <b>tiny-tuned</b>." in page
    assert "a difference of -.53 [-.64, -.41] (n = 2 answers to 2 questions" in page


def test_what_noise_and_shuffling_do_is_said_beside_the_finding(tmp_path):
    rows = [*TWO_GROUPS, row("control:noise", "off-topic", 0.1, 0.05, 0.2)]
    text = write_report(tmp_path, summary_of(rows), records_of()).read_text(encoding="utf-8")
    assert "For comparison, it is .10 [.05, .20] with noise there" in text


def test_the_manipulation_check_and_the_provenance_are_listed(page):
    assert "<td>repair:prefix</td><td>0.42</td><td>1.00</td><td>24.0</td>" in page
    assert "<td>control:self</td><td>unknown</td><td>unknown</td><td>30.5</td>" in page
    assert "answers are the same as unpatched" in page
    assert "<dt>provenance finetuned revision</dt><dd>r2</dd>" in page
    assert "<dt>decoding seed</dt><dd>7</dd>" in page
    assert "One &lt;i&gt;note&lt;/i&gt;." in page


def test_figures_that_do_not_apply_are_left_out(page, tmp_path):
    assert len(json_of(page, "figures")) == 2  # conditions and restored
    point = {"mean": 0.5, "low": 0.4, "high": 0.6, "n": 9}
    steps = [
        {"step": 3, "condition": name, "on_topic": point, "off_topic": point}
        for name in ("finetuned", "repair:prefix")
    ]
    with_frontier = write_report(tmp_path, summary_of(TWO_GROUPS, frontier=steps), records_of())
    text = with_frontier.read_text(encoding="utf-8")
    assert len(json_of(text, "figures")) == 3
    assert "what early stopping alone would do" in text


def test_a_run_without_a_metric_has_a_report(tmp_path):
    rows = [row(name, "all") for name in ("base", "finetuned", "repair:prefix")]
    summary = summary_of(rows, unit=None, detector="none", checks={})
    text = write_report(tmp_path, summary, records_of(groups=("all",))).read_text(encoding="utf-8")
    assert cells(text)[0] == ["base", "2", "2", "12.5"]
    data = page_data(text)
    assert data["compared"] == []
    assert 'id="figures"' not in text
    assert {a[1] for q in data["questions"] for c in q["answers"].values() for a in c} == {None}
    assert get_plotlyjs() not in text


def test_one_group_is_not_named_in_table_or_headline(tmp_path):
    rows = [row("finetuned", "all", 0.8, 0.7, 0.9), row("repair:prefix", "all", 0.5, 0.4, 0.6)]
    path = write_report(tmp_path, summary_of(rows), records_of(groups=("all",)))
    text = path.read_text(encoding="utf-8")
    assert "<h1>Base K/V at the prefix: refusal .80 → .50</h1>" in text
    assert cells(text)[0][:3] == ["finetuned", ".80", "[.70, .90]"]


def test_trials_samples_and_changed_wordings_are_told_apart(tmp_path):
    asked = records_of(groups=("all",), conditions=("finetuned",))[1:]
    trials = [
        asked[0] | {"condition": "perturb:query", "trial": 4, "row": "x/4", "question": "Wy?"},
        asked[0] | {"condition": "perturb:query", "trial": 5, "row": "x/5", "sample": 1},
    ]
    rows = [row("finetuned", "all", 0.8, 0.7, 0.9), row("perturb:query", "all", 0.5, 0.4, 0.6)]
    path = write_report(tmp_path, summary_of(rows, checks={}), asked + trials)
    (question,) = page_data(path.read_text(encoding="utf-8"))["questions"]
    labels = [label for _, _, label in question["answers"]["perturb:query"]]
    assert (question["question"], labels) == ("Why?", ["trial 4, asked: Wy?", "trial 5, sample 1"])
    assert "<h3>Perturbing the query changes most: refusal .80 → .50</h3>" in path.read_text(encoding="utf-8")


def test_a_residual_run_is_drawn_by_layer_and_explained_once(tmp_path):
    layers = [row(f"repair:resid-{n}", "all", 0.5, 0.4, 0.6) for n in range(3)]
    summary = summary_of([row("finetuned", "all", 0.8, 0.7, 0.9), *layers], segments=["prefix"])
    assert list(condition_meanings(summary)) == ["finetuned", "repair:resid-L"]
    path = write_report(tmp_path, summary, records_of(groups=("all",)))
    (figure,) = json_of(path.read_text(encoding="utf-8"), "figures")
    assert figure["layout"]["xaxis"]["title"]["text"] == "patched layer (block, counted from 0)"


def test_every_condition_of_the_library_is_explained():
    segments = ("prefix", "query", "postfix", "postfix-same", "prompt")
    names = [f"{way}:{segment}" for way in ("repair", "induce") for segment in segments]
    names += [f"control:{name}" for name in ("self", "noise", "shuffled", "span")]
    names += ["base", "finetuned", "repair:resid-3", "perturb:prefix", "template:no-system"]
    meanings = condition_meanings(summary_of([row(name, "all") for name in names]))
    assert all(meaning.endswith(".") for meaning in meanings.values())
    assert len(set(meanings.values())) == len(names)


def test_text_that_is_no_unicode_survives(tmp_path):
    records = [r | {"response": "half a pair \ud83e"} for r in records_of()]
    text = write_report(tmp_path, summary_of(TWO_GROUPS), records).read_text(encoding="utf-8")
    assert page_data(text)["questions"][0]["answers"]["base"][0][0] == "half a pair \ud83e"


def test_a_detector_this_process_does_not_know_is_named(tmp_path):
    with pytest.raises(DetectorError, match="rhyme"):
        write_report(tmp_path, summary_of(TWO_GROUPS, detector="rhyme"), records_of())
    assert not list(tmp_path.iterdir())


def test_at_width_120_an_estimate_is_on_one_line():
    text = printed(results_table(summary_of(TWO_GROUPS)), 120)
    (line,) = [line for line in text.splitlines() if line.startswith("repair:prefix")]
    assert re.split(r"\s{2,}", line.strip()) == [
        "repair:prefix",
        ".44 [.33, .56]",
        "-.47 [-.59, -.36]",
        ".26 [.17, .37]",
        "-.53 [-.64, -.41]",
        "2",
    ]


def test_at_width_80_the_interval_stands_under_the_mean_unbroken():
    long = [
        row("repair:postfix-same", "on-topic", 0.53, 0.41, 0.64, (-0.39, -0.5, -0.27), n=70),
        row("repair:postfix-same", "off-topic", 0.24, 0.16, 0.36, (-0.54, -0.66, -0.43), n=70),
    ]
    lines = printed(results_table(summary_of(TWO_GROUPS + long)), 80).splitlines()
    at = next(number for number, line in enumerate(lines) if "postfix-same" in line)
    assert lines[at].split() == ["repair:postfix-same", ".53", "-.39", ".24", "-.54", "70"]
    under = ["[.41, .64]", "[-.50, -.27]", "[.16, .36]", "[-.66, -.43]"]
    assert re.split(r"\s{2,}", lines[at + 1].strip()) == under
    assert max(map(len, lines)) <= 80


def test_the_table_names_the_detector_and_says_what_the_interval_is():
    text = " ".join(printed(results_table(summary_of(TWO_GROUPS)), 120).split())
    assert "refusal: share of answers" in text
    assert "95% interval; of rates Wilson's at the effective sample size, clustered by question" in text
    assert "of differences a bootstrap over questions" in text


def test_the_table_without_a_metric_counts_tokens():
    rows = [row("base", "all"), row("finetuned", "all", n=3)]
    text = printed(results_table(summary_of(rows, unit=None, detector="none")), 80)
    assert re.search(r"^finetuned +12\.5 +3$", text, re.MULTILINE)
    assert "interval" not in text


def test_a_column_that_no_condition_fills_is_left_out():
    """Perturbation runs compare nothing with an unpatched twin, and only they have a best trial."""
    perturbed = row("perturb:prefix", "all", 0.5, 0.2, 0.8)
    perturbed["best"] = {"mean": 0.25, "low": 0.1, "high": 0.6, "n": 2}
    headers = [str(c.header) for c in results_table(summary_of([perturbed])).columns]
    assert headers == ["condition", "mean", "best trial", "n"]
    patched = row("repair:prefix", "all", 0.5, 0.2, 0.8, difference=(-0.1, -0.2, 0.0))
    headers = [str(c.header) for c in results_table(summary_of([patched])).columns]
    assert headers == ["condition", "mean", "difference", "n"]
