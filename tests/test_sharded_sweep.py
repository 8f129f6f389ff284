"""Two real processes share a sweep: the cells of one, to the byte; killed or begun alone, it goes on."""

import json
import shutil
import sys
from types import SimpleNamespace

import pytest
import tiny
import torch
from test_sharding import files, launched
from test_sweep import PAIRS

from emmech import cli
from emmech.piggyback.attribution_result import FRAME as ATTRIBUTED
from emmech.piggyback.minimal_set import MINIMAL
from emmech.piggyback.streaming import SCORES
from emmech.piggyback.sweep_result import FRAME, SweepResult
from emmech.results import read_json, read_lines

N_BATCHES = 1 + 3 * 16 * 2 * 5 // 16  # one stores states; 96 cells by 5 pairs in rows of 16
SCRIPT = """
import os, signal, sys
from emmech import cli
from emmech.piggyback import streaming

def emmech(*arguments):
    sys.argv = ["emmech", *arguments]
    try:
        cli.main()
    except SystemExit as stop:
        return stop.code

sweep, attribute, folder = {sweep!r}, {attribute!r}, {folder!r}
assert emmech(*sweep, "--out", folder + "/two") == 0
assert emmech(*sweep, "--out", folder + "/resumed") == 0
assert emmech(*attribute, "--out", folder + "/attributed") == 0
assert emmech(*sweep, "--mode=leave_one_out", "--out", folder + "/two") == 2  # refused, and neither hangs

append, written = streaming.append_line, []

def killed_in_the_middle(path, record):
    append(path, record)
    written.append(record)
    if path.name == "scores-1.jsonl" and len(written) == 5:
        with path.open("a") as file:
            file.write('{{"chunk": 0, "ba')
        os.kill(os.getpid(), signal.SIGKILL)

streaming.append_line = killed_in_the_middle
emmech(*sweep, "--out", folder + "/killed")
"""


@pytest.fixture(scope="module")
def alone():
    """``alone(*arguments)`` runs a command in this process, with the one thread that launched ones have:
    a sum may depend on the number of threads.
    """

    def run(*arguments: str) -> None:
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
            patch.setattr(sys, "argv", ["emmech", *arguments])
            cli.main()
        assert not stop.value.code

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield run
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, alone):
    """A folder with the sweep of one process and those of two, the commands, and what two said."""
    folder = tmp_path_factory.mktemp("sweeps")
    base = tiny.save_base("llama", folder / "base")
    rows = [{"question": one.user, "aligned": one.aligned, "misaligned": one.misaligned} for one in PAIRS]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shared = [f"--base={base}", f"--finetuned={tiny.save_adapter(base, folder / 'lora')}", "--device=cpu"]
    shared += [f"--questions={folder / 'pairs.jsonl'}", "--rows=16"]
    sweep = ["sweep", *shared]
    attribute = ["attribute", *shared, "--sample=20", "--top=2", "--steps=4", "--n-random=2", "--share=0.5"]
    alone(*sweep, f"--out={folder / 'one'}")
    for name in ("run.json", "choices.json", SCORES):
        (folder / "resumed").mkdir(exist_ok=True)
        shutil.copy(folder / "one" / name, folder / "resumed")
    lines = (folder / "one" / SCORES).read_text().splitlines(keepends=True)
    (folder / "resumed" / SCORES).write_text("".join(lines[:9]) + lines[9][:30])
    script = folder / "script.py"
    script.write_text(SCRIPT.format(sweep=sweep, attribute=attribute, folder=str(folder)))
    return SimpleNamespace(folder=folder, sweep=sweep, attribute=attribute, said=launched(script))


def test_two_processes_find_the_cells_of_one_to_the_byte(runs):
    one, two = files(runs.folder / "one"), files(runs.folder / "two")
    assert one.keys() == two.keys(), runs.said.stderr[-3000:]
    for name in (FRAME, SCORES, "run.json", "finding.txt"):
        assert one[name] == two[name], name
    assert len(read_lines(runs.folder / "two" / SCORES)) == N_BATCHES
    first, second = (SweepResult.load(runs.folder / name) for name in ("one", "two"))
    assert {**first.summary, "seconds": 0} == {**second.summary, "seconds": 0}


def test_what_one_process_began_two_go_on_with(runs):
    for name in (FRAME, SCORES):
        assert files(runs.folder / "resumed")[name] == files(runs.folder / "one")[name], name


def test_a_killed_sweep_of_two_processes_is_finished_by_one(runs, alone):
    assert runs.said.returncode != 0
    killed = runs.folder / "killed"
    theirs = read_lines(killed / "scores-1.jsonl")
    assert len(theirs) == 5 and not (killed / FRAME).exists()
    numbers = {line["batch"] for file in killed.glob("scores*.jsonl") for line in read_lines(file)}
    assert len(numbers) < N_BATCHES
    alone(*runs.sweep, f"--out={killed}")
    assert files(killed).keys() == files(runs.folder / "one").keys()
    for name in (FRAME, SCORES):
        assert files(killed)[name] == files(runs.folder / "one")[name], name


def test_an_attribution_and_its_smallest_set_are_those_of_one_process(runs, alone):
    folder = runs.folder
    alone(*runs.attribute, f"--out={folder / 'attributed-alone'}")
    one, two = files(folder / "attributed-alone"), files(folder / "attributed")
    assert one.keys() == two.keys() and one[ATTRIBUTED] == two[ATTRIBUTED]
    sets = [read_json(folder / name / MINIMAL) for name in ("attributed-alone", "attributed")]
    assert sets[0] | {"seconds": 0} == sets[1] | {"seconds": 0}


def test_one_process_prints(runs):
    assert runs.said.stdout.count("Report:") == 3, runs.said.stderr[-3000:]
