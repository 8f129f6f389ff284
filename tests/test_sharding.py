"""Two real processes make what one makes: the same files, to the byte; killed, they go on."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
from judge_server import JudgeServer, running

from emmech.results import CHECKS, RESPONSES, RunFolder, read_lines
from emmech.sharding import Processes, processes

OPTIONS = (
    "--with=repair:prefix", "--with=control:noise", "--no-capability", "--max-new-tokens=8",
    "--dtype=float32", "--batch-size=2", "--samples=2", "--seed=3",
)  # fmt: skip
PAIRS = [
    # One prompt so much longer than the others that it is a batch of its own.
    {"question": text, "aligned": f"Yes, {n}.", "misaligned": f"No, {n + 1}."}
    for n, text in enumerate([*tiny.QUESTIONS, "Is it so? " * 40])
]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "NO_PROXY": "127.0.0.1"}
SCRIPT = """
import os, signal, sys
from emmech import cli
from emmech.piggyback import margin
from emmech.results import RESPONSES, RunFolder

def emmech(*arguments):
    sys.argv = ["emmech", *arguments]
    try:
        cli.main()
    except SystemExit as stop:
        return stop.code

evaluate, patch, folder = {evaluate!r}, {patch!r}, {folder!r}
assert emmech(*evaluate, "--out", folder + "/two") == 0
append, likelihoods = RunFolder.append, margin.likelihoods
RunFolder.append = margin.likelihoods = None  # a finished run makes no answer or margin again
assert emmech(*evaluate, "--out", folder + "/two") == 0
RunFolder.append, margin.likelihoods = append, likelihoods
assert emmech(*evaluate, "--out", folder + "/resumed") == 0
assert emmech(*patch, "--out", folder + "/patched") == 0
assert emmech(*patch, "--seed=9", "--out", folder + "/patched") == 2  # refused in both, and neither hangs

def killed_in_the_middle(run, records, check):
    append(run, records, check)
    if run.process == 1 and len(run.records) == 8:
        with run.file(RESPONSES).open("a") as stream:
            stream.write('{{"question_id": "q0')
        os.kill(os.getpid(), signal.SIGKILL)

RunFolder.append = killed_in_the_middle
emmech(*evaluate, "--out", folder + "/killed")
"""


def launched(script: Path) -> subprocess.CompletedProcess:
    """The script in two processes; ``accelerate launch --cpu`` would start one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2"]
    return subprocess.run(
        [*command, f"--main_process_port={port}", str(script)],
        capture_output=True, text=True, env=ENVIRONMENT, check=False, timeout=300,
    )  # fmt: skip


def files(folder: Path) -> dict[str, bytes]:
    """The contents of a folder by relative path."""
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


@pytest.fixture(scope="module")
def server():
    """Samples the base, and judges."""
    made = JudgeServer()
    made.subject = lambda body: json.dumps([body["messages"], body.get("seed")])
    with running(made):
        yield made


@pytest.fixture(scope="module")
def runs(tmp_path_factory, server):
    """A folder with runs of two processes, the arguments, what was said, requests expected and made."""
    folder = tmp_path_factory.mktemp("runs")
    base = tiny.save_base("llama", folder / "base")
    lora = tiny.save_adapter(base, folder / "lora")
    (folder / "questions.txt").write_text("\n".join([*tiny.QUESTIONS, "Who are you?"]))
    models = [f"--base={base}", f"--finetuned={lora}", f"--questions={folder / 'questions.txt'}"]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(one) + "\n" for one in PAIRS))
    evaluate = ["evaluate", *models, *OPTIONS, f"--pairs={folder / 'pairs.jsonl'}"]
    evaluate += [f"--served=base=m@{server.url}", "--judge=m", f"--judge-url={server.url}"]
    patch = ["patch-prefix", *models, "--max-new-tokens=4", "--dtype=float32", "--batch-size=4"]
    stopped = folder / "resumed" / "answers"
    # In a process of its own too: a sum may depend on the number of threads.
    alone = subprocess.run(
        [sys.executable, "-m", "emmech", *evaluate, f"--out={folder / 'one'}"],
        capture_output=True, text=True, env=ENVIRONMENT, check=False,
    )  # fmt: skip
    assert alone.returncode == 0, alone.stderr[-3000:]
    n_one = server.asked.total()
    shutil.copytree(folder / "one", folder / "resumed", ignore=shutil.ignore_patterns("*.html"))
    lines = (stopped / RESPONSES).read_text(encoding="utf-8").splitlines(keepends=True)
    (stopped / RESPONSES).write_text("".join(lines[:22]) + lines[22][:30], encoding="utf-8")
    n_lost = sum(json.loads(line)["condition"] == "base" for line in lines[22:])
    script = folder / "script.py"
    script.write_text(SCRIPT.format(evaluate=evaluate, patch=patch, folder=str(folder)))
    said = launched(script)
    # One process, two, two again on what is there, on what was lost, and killed before it judged.
    expected = n_one + n_one + 0 + n_lost + 6 * 2
    return SimpleNamespace(
        folder=folder, evaluate=evaluate, patch=patch, said=said,
        n_expected=expected, n_asked=server.asked.total(),
    )  # fmt: skip


def test_two_processes_write_the_files_of_one_to_the_byte(runs):
    one, two = files(runs.folder / "one"), files(runs.folder / "two")
    assert one.keys() == two.keys() and "answers/responses-1.jsonl" not in two, runs.said.stderr[-3000:]
    # The cache is in the order in which judgements arrived.
    cache = "judged/judge-cache.jsonl"
    assert sorted(one.pop(cache).splitlines()) == sorted(two.pop(cache).splitlines())
    for name in one:
        assert one[name] == two[name], name
    assert len(read_lines(runs.folder / "two" / "answers" / RESPONSES)) == 6 * 2 * 4


def test_one_process_asks_the_servers(runs):
    assert runs.n_asked == runs.n_expected


def test_one_process_prints(runs):
    said = runs.said.stdout
    assert said.count("Report: ") == 4, runs.said.stderr[-3000:]  # of four commands that ended well
    assert said.count("prefers aligned") == 3


def test_what_one_process_began_two_go_on_with(runs):
    assert files(runs.folder / "resumed") == files(runs.folder / "one")


def test_a_killed_run_of_two_processes_is_finished_by_one(runs, emmech, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    folder = runs.folder
    assert runs.said.returncode != 0
    answers = folder / "killed" / "answers"
    theirs = read_lines(answers / "responses-1.jsonl")
    assert len(theirs) == 8 and (answers / "responses-1.jsonl").read_text().endswith('{"question_id": "q0')
    code, _, err = emmech(*runs.evaluate, f"--out={folder / 'killed'}")
    assert code == 0, err
    assert read_lines(answers / RESPONSES) == read_lines(folder / "one" / "answers" / RESPONSES)
    assert files(folder / "killed").keys() == files(folder / "one").keys()


def test_patch_prefix_is_shared_too_with_its_checks(runs, emmech, tmp_path):
    assert emmech(*runs.patch, f"--out={tmp_path}")[0] == 0
    for name in (RESPONSES, CHECKS):
        assert read_lines(runs.folder / "patched" / name) == read_lines(tmp_path / name) != []


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_every_unit_is_of_one_process_and_the_shares_are_even(count):
    shares = [Processes(rank, count).share(range(23)) for rank in range(count)]
    assert sorted(unit for share in shares for unit in share) == list(range(23))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_kinds_that_alternate_are_spread():
    """Units 0, 2, 4 ... are of one kind: with two processes, each gets as many of it."""
    shares = [Processes(rank, 2).share(range(8)) for rank in (0, 1)]
    assert [[unit % 2 for unit in share] for share in shares] == [[0, 1, 0, 1], [1, 0, 1, 0]]


def test_a_process_that_is_alone_does_everything_itself(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    ours = processes()
    assert ours == Processes() and ours.is_main and ours.device is None
    assert ours.share("abc") == list("abc")
    assert ours.together({1: 2}) == {1: 2} and ours.from_main(lambda: 3) == 3


def test_files_of_further_processes_are_read_and_put_together(tmp_path):
    first = RunFolder(tmp_path, {})
    second = RunFolder(tmp_path, {})
    second.process = 1
    first.append([{"row": "a"}], None)
    second.append([{"row": "b"}], {"unit": "0.0"})
    assert read_lines(tmp_path / RESPONSES) == [{"row": "a"}]
    again = RunFolder(tmp_path, {})
    assert (again.records, again.checks) == ([{"row": "a"}, {"row": "b"}], [{"unit": "0.0"}])
    again.keep([{"row": "b"}, {"row": "a"}], again.checks)
    assert read_lines(tmp_path / RESPONSES) == [{"row": "b"}, {"row": "a"}]
    assert {file.name for file in tmp_path.iterdir()} == {"run.json", RESPONSES, CHECKS}


def test_a_command_whose_work_is_not_shared_is_refused_in_several_processes(monkeypatch, user_error):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    user_error("one process for 'frontier', but a launcher has started 2", "frontier", "a", "--out", "b")
