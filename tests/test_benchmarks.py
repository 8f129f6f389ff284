"""Benchmarks: ratios and exponents by hand, and other tools that patch the very same cell."""

import json

import numpy as np
import pytest
import tiny
import torch
from transformers import AutoTokenizer

from benchmarks import __main__ as command
from benchmarks import attribution, generation, growth, measure, page, sweep, training
from benchmarks.measure import (
    Aim,
    Seconds,
    alternated,
    cells,
    code,
    installed,
    machine,
    not_measured,
    number,
    ratio,
)
from benchmarks.peers import with_nnsight, with_transformer_lens
from benchmarks.setting import with_prefix
from benchmarks.sweep import spread, whole
from emmech.chat import Chat
from emmech.models.default import embedded_path
from emmech.piggyback.cells import grid, patches
from emmech.piggyback.replay import Replay
from emmech.piggyback.scores import find_metric
from emmech.piggyback.streaming import score_patches


def test_functions_take_turns():
    said = []
    times = alternated({name: lambda name=name: said.append(name) for name in "ab"}, repeats=3)
    assert "".join(said) == "ababab"
    assert all(len(taken) == 3 and min(one.wall for one in taken) > 0 for taken in times.values())


def test_a_ratio_is_that_of_medians_and_its_range_is_over_turns():
    above = [Seconds(6.0, 1.0), Seconds(9.0, 2.0), Seconds(30.0, 3.0)]
    below = [Seconds(3.0, 1.0), Seconds(1.0, 1.0), Seconds(4.0, 1.0)]
    row = ratio("a / b", above, below, Aim(5.0), scale=2.0)
    assert (row["value"], row["low"], row["high"], row["cpu"]) == (6.0, 4.0, 18.0, 4.0)
    assert row["met"] and not number("x", 6.0, Aim(5.0, "lower"))["met"]
    assert cells(row) == ("6.00", "4.00 to 18.00", "4.00", "≥ 5", "met")
    assert cells(number("x", 6.0, Aim(5.0, "lower")))[-2:] == ("≤ 5", "MISSED")
    assert "not installed" in cells(not_measured("x", "not installed"))[-1]


def test_an_exponent_is_the_slope_on_log_axes():
    points = [{"axis": "cells", "at": n, "seconds": 3 * n**1.5} for n in (1, 4, 16)]
    points += [{"axis": "rows", "at": 2, "seconds": 9.0}]
    assert growth.exponent(points, "cells", "seconds") == pytest.approx(1.5)


def test_the_page_says_once_what_all_benchmarks_share():
    facts = {"sweep": {"cpu": "x", "threads": 2}, "loading": {"cpu": "x", "threads": 1}}
    assert page.shared(facts) == {"cpu": "x", "sweep": {"threads": 2}, "loading": {"threads": 1}}


def test_places_are_spread_evenly():
    assert spread(30, 4) == [3, 11, 18, 26] and spread(3, 8) == [0, 1, 2]


def test_what_is_done_once_is_not_scaled():
    assert whole(Seconds(5.0, 4.0), Seconds(2.0, 1.0), 10) == Seconds(32.0, 31.0)


@pytest.mark.weights
def test_a_system_message_makes_the_prefix_as_long_as_asked():
    chat = Chat(AutoTokenizer.from_pretrained(embedded_path()))
    assert with_prefix(chat, 256).render("Why?").n_prefix == 256


@pytest.mark.parametrize("peer", [with_transformer_lens, with_nnsight])
def test_other_tools_score_a_cell_as_a_sweep_does(make_pair, peer):
    pair = make_pair("llama")
    replay = Replay(pair, list(tiny.QUESTIONS), find_metric("target:Yes."), "repair")
    some = [cell for cell in grid(("layer", "position", "kv"), replay.shape) if cell.position[0] in (3, 9)]
    ours = score_patches(replay, [*patches(some, "single", replay.shape)], progress=False)
    theirs = peer(replay)
    found = np.stack([theirs(cell).numpy() for cell in some])
    np.testing.assert_allclose(found, ours.patched, atol=1e-4)
    assert (np.abs(ours.patched - ours.unpatched).max(1) > 1e-4).all()  # and every cell does something


def test_results_of_other_benchmarks_stay_and_the_page_shows_all(tmp_path, monkeypatch):
    """The command with two benchmarks of its own: what is kept, and what is shown."""
    monkeypatch.setattr(command.Setting, "make", lambda *_: SETTING)
    rows = {
        "loading": [number("loading a / b", 2.0, Aim(3.0, "lower"), low=1.0, high=3.0)],
        "growth": [
            number(f"{axis} {at}", 1.0 * at, axis=axis, at=at, seconds=1.0 * at, peak_gib=1.0)
            for axis, values in growth.AXES.items()
            for at in values
        ],
    }
    for name, found in rows.items():
        module = type("module", (), {"measure": staticmethod(lambda _, found=found: found)})
        monkeypatch.setattr(command, "import_module", lambda _, module=module: module)
        command.main([name, f"--folder={tmp_path / 'page'}", f"--results={tmp_path}"])
    kept = json.loads((tmp_path / "results.json").read_text())
    assert {name: one["rows"] for name, one in kept.items()} == rows
    assert kept["growth"]["machine"]["torch"] == torch.__version__ == machine()["torch"]
    shown = (tmp_path / "page" / "report.html").read_text()
    assert "loading a / b" in shown and "time grows as their power 1.00" in shown
    figure = page.growth(rows["growth"], "seconds")
    assert list(figure.data[0].x) == list(figure.data[0].y) == [1, 4, 16]
    with pytest.raises(SystemExit):
        command.main(["speed"])


def in_this_process(setting, size):
    return growth.sweep(setting.base, str(setting.adapter), setting.dtype or "float32", setting.device, size)


@pytest.fixture
def little(monkeypatch):
    """Less of everything that is measured."""
    for module in (sweep, attribution):
        monkeypatch.setattr(module, "N_QUESTIONS", 1)
    monkeypatch.setattr(sweep, "N_POSITIONS", 2)
    monkeypatch.setattr(sweep, "N_PEER_CELLS", 2)
    for name, value in {"N_PROMPTS": 4, "N_ALONE": 2, "NEW_TOKENS": 3, "N_CHECKED": 2}.items():
        monkeypatch.setattr(generation, name, value)
    monkeypatch.setattr(training, "N_STEPS", 2)
    monkeypatch.setattr(growth, "child", in_this_process)
    for axis in ("questions", "prefix", "rows"):
        monkeypatch.delitem(growth.AXES, axis)
    monkeypatch.setitem(growth.AXES, "cells", (2, 4))


@pytest.mark.weights
@pytest.mark.timeout(1200)
def test_all_benchmarks_run_in_another_dtype_and_a_second_setting_in_the_same_folder(
    tmp_path, monkeypatch, little
):
    """As on a GPU: a random shape in bfloat16; then in float32, where copies for other tools do not fit."""
    how = ["--shape=tiny", "--device=cpu", "--repeats=1", f"--folder={tmp_path}", f"--results={tmp_path}"]
    names = [name for name in command.NAMES if name != "long_prefix"]  # in one_answer, too
    command.main([*names, *how, "--dtype=bfloat16"])
    kept = json.loads((tmp_path / "results-tiny-bfloat16.json").read_text())
    assert list(kept) == names
    absent = [row["name"] for one in kept.values() for row in one["rows"] if "not_measured" in row]
    assert len(absent) == (not installed("pyvene"))
    assert all(one["setting"]["dtype"] == "bfloat16" and one["code"] == code() for one in kept.values())
    monkeypatch.setattr(measure, "COPIES", 1e9)
    command.main(["sweep", "attribution", "generation", *how])
    other = json.loads((tmp_path / "results-tiny.json").read_text())
    absent = [row["not_measured"] for one in other.values() for row in one["rows"] if "not_measured" in row]
    assert absent.count("two more copies of 0 GiB do not fit") == 2 + 2 + installed("pyvene")


SETTING = command.Setting("smollm2", "smollm2", None, "cpu", None, 1, None)
