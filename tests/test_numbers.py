"""Numbers in README, docs and figures/README.md come from the saved results, and say so."""

import json
import re
import subprocess
import sys

import pytest

from figures import numbers


@pytest.fixture
def results(tmp_path, monkeypatch):
    """A results folder with one file, `toy`."""
    rows = [
        {"condition": "base", "group": "on", "rate": {"mean": 0.1, "low": 0.05, "high": 0.2, "n": 60}},
        {"condition": "base", "group": "off", "rate": {"mean": 0.004, "low": 0.0, "high": 0.0612, "n": 60}},
        {"condition": "tuned", "group": "on", "auc": 0.75, "low": 0.625, "high": 0.9},
    ]
    (tmp_path / "toy.json").write_text(json.dumps({"rows": rows, "seconds": 18.26, "mark": "x"}))
    monkeypatch.setattr(numbers, "RESULTS", tmp_path)
    monkeypatch.setattr(numbers, "ROOT", tmp_path)
    numbers._load.cache_clear()
    numbers._everything.cache_clear()
    yield
    numbers._load.cache_clear()
    numbers._everything.cache_clear()


RATE = "toy / rows / condition=base & group=on / rate"


@pytest.mark.parametrize("page", numbers.pages(), ids=lambda page: str(page.relative_to(numbers.ROOT)))
def test_every_number_of_a_page_says_what_the_results_say(page):
    assert numbers.check(page.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("page", numbers.pages(), ids=lambda page: str(page.relative_to(numbers.ROOT)))
def test_no_interval_and_no_rate_of_a_page_is_without_an_origin(page):
    text = page.read_text(encoding="utf-8")
    lost = numbers.without_origin(text, rates=numbers.needs_all(page))
    assert [match["text"] for match in lost] == []


def test_the_pages_are_the_ones_that_have_measured_numbers():
    names = {str(page.relative_to(numbers.ROOT)) for page in numbers.pages()}
    assert {"README.md", "figures/README.md", "docs/index.md"} <= names
    marked = {page for page in numbers.pages() if "<!--= " in page.read_text(encoding="utf-8")}
    assert {"README.md", "figures/README.md"} <= {str(page.relative_to(numbers.ROOT)) for page in marked}


@pytest.mark.parametrize(
    ("text", "origin"),
    [
        (".10 [.05, .20]", RATE),
        ("0.1 [0.1, 0.2]", RATE),
        (".1", RATE),
        ("10%", RATE),
        ("-.10 [-.20, -.05]", f"-{RATE}"),
        (".00 [.00, .06]", "toy / rows / condition=base & group=off / rate"),
        (".75 [.62, .90]", "toy / rows / condition=tuned / auc"),
        ("60", f"{RATE} / n"),
        ("18", "toy / seconds"),
        ("18.3", "toy / seconds"),
        (".75", "toy / rows / 2 / auc"),
    ],
)
def test_a_value_is_written_as_the_text_is(results, text, origin):
    assert numbers.written(numbers.follow(origin), text) == text
    assert numbers.check(f"it is {text}<!--= {origin} -->, or **{text}**<!--= {origin} -->") == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f".11 [.05, .20]<!--= {RATE} -->", ".11 [.05, .20] is now .10 [.05, .20]"),
        (f".10 [.05, .21]<!--= {RATE} -->", "is now .10 [.05, .20]"),
        (f"60 [1, 2]<!--= {RATE} / n -->", "60 [1, 2] is now 60 "),
        (f"many <!--= {RATE} -->", "1 origins, 0 of them right behind a number"),
        (".1<!--= other / rows -->", "there is no other.json"),
        (".1<!--= toy / rows / condition=base / rate -->", "2 entries fit 'condition=base'"),
        (".1<!--= toy / rows / condition=tuned / rate -->", "'rate' is not there"),
        (".1<!--= toy / mark -->", "leads to no number but to x"),
    ],
)
def test_a_number_that_drifted_and_an_origin_that_leads_nowhere_are_named(results, text, said):
    (wrong,) = numbers.check(text)
    assert said in wrong + " "


def test_fixing_writes_what_the_results_say_and_nothing_else(results):
    text = f"a .11 [.05, .21]<!--= {RATE} --> b **-7%**<!--= -{RATE} -->, seed 3, .44"
    fixed = numbers.fixed(text)
    assert fixed == f"a .10 [.05, .20]<!--= {RATE} --> b **-10%**<!--= -{RATE} -->, seed 3, .44"
    assert numbers.check(fixed) == [] and numbers.fixed(fixed) == fixed
    lost = ".1<!--= nowhere / mean -->"
    assert numbers.fixed(f"{lost} {text}") == f"{lost} {fixed}"  # checked, too, and said


def test_intervals_and_rates_without_an_origin_are_found():
    text = (
        f"by .27 [.12, .43], at .90, **-.31**, v0.1.25, 3.11, .9, .5 [.4, .6]<!--= {RATE} -->"
        " and .77<!--@ arXiv 1 -->\n```\n.55 [.1, .9]\n```\n<!-- skip: .66 -->"
    )
    found = [match["text"] for match in numbers.without_origin(text, rates=True)]
    assert found == [".27 [.12, .43]", ".90", "-.31"]
    assert [m["text"] for m in numbers.without_origin(text, rates=False)] == [".27 [.12, .43]"]


def test_origins_are_added_where_one_value_fits(results):
    text = "from .10 [.05, .20] by -.10 [-.20, -.05] to .75 [.62, .90] and .33 [.1, .5]"
    added = numbers.with_origins(text)
    assert re.sub("<!--.*?-->", "", added) == text
    assert re.findall("<!--= (.*?) -->", added) == [RATE, f"-{RATE}", "toy / rows / condition=tuned / auc"]
    assert numbers.check(added) == []


def test_the_command_names_what_is_wrong_and_fails(tmp_path, monkeypatch, capsys):
    page = tmp_path / "README.md"
    page.write_text("by .27 [.12, .43] then")
    monkeypatch.setattr(numbers, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["numbers"])
    with pytest.raises(SystemExit) as stop:
        numbers.main()
    assert stop.value.code == 1
    assert "README.md: .27 [.12, .43] has no origin; could it be ['-narrow" in capsys.readouterr().out


def test_the_module_runs_from_the_root_and_agrees_with_these_tests():
    done = subprocess.run(
        [sys.executable, "-m", "figures.numbers"], capture_output=True, text=True, cwd=numbers.ROOT
    )
    assert done.returncode == 0, done.stdout
