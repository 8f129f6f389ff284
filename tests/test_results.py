"""A run folder: it belongs to one set of arguments, and loses nothing but unfinished lines."""

import json
import pickle
import sys
from pathlib import Path

import pytest

from emmech.errors import RunError
from emmech.results import (
    CHECKS,
    RESPONSES,
    RUN,
    RunFolder,
    read_json,
    read_responses,
    versions,
    write_json,
)

ARGUMENTS = {"kind": "patch-prefix", "decoding": {"seed": 0, "samples": 2}}
RECORDS = [{"row": f"q{n}", "response": f"line\n{n} 🎉 שלום\u2028\x85"} for n in range(3)]
CHECK = {"condition": "repair:prefix", "unit": "0.0", "numerator": [1.5]}


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    made = RunFolder(tmp_path / "runs" / "mine", ARGUMENTS)
    made.append(RECORDS[:2], CHECK)
    made.append(RECORDS[2:], None)
    return made


def again(folder: RunFolder) -> RunFolder:
    return RunFolder(folder.path, ARGUMENTS)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def test_a_new_folder_is_made_with_its_parents_and_holds_its_arguments(tmp_path):
    made = RunFolder(tmp_path / "a" / "b", ARGUMENTS)
    assert json.loads((tmp_path / "a" / "b" / RUN).read_text()) == ARGUMENTS
    assert made.records == made.checks == []


def test_appended_records_are_on_disk_in_order_one_to_a_line_and_with_their_checks(folder):
    assert lines(folder.path / RESPONSES) == RECORDS == folder.records
    assert lines(folder.path / CHECKS) == [CHECK] == folder.checks


def test_a_folder_opened_again_has_the_records_to_the_letter(folder):
    opened = again(folder)
    assert opened.records == RECORDS
    assert opened.checks == [CHECK]
    assert read_responses(folder.path) == RECORDS


def test_opening_again_changes_no_file(folder):
    before = {file.name: file.read_bytes() for file in folder.path.iterdir()}
    again(folder)
    assert {file.name: file.read_bytes() for file in folder.path.iterdir()} == before


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_line_that_was_cut_is_left_out_and_those_before_it_are_kept(folder, cut):
    file = folder.path / RESPONSES
    file.write_bytes(file.read_bytes()[: -1 - cut])
    assert again(folder).records == RECORDS[:2]


def test_a_cut_inside_the_bytes_of_one_character_loses_that_line_only(folder):
    file = folder.path / RESPONSES
    content = file.read_bytes()
    at = content.rindex("🎉".encode())
    file.write_bytes(content[: at + 2])
    assert again(folder).records == RECORDS[:2]


def test_nothing_after_a_broken_line_is_read(folder):
    file = folder.path / RESPONSES
    first, second, third = file.read_text(encoding="utf-8").split("\n")[:-1]
    file.write_text("\n".join([first, second[:9], third]) + "\n", encoding="utf-8")
    assert again(folder).records == RECORDS[:1]


def test_a_line_that_is_json_but_no_record_counts_as_broken(folder):
    file = folder.path / RESPONSES
    first, second, third = file.read_text(encoding="utf-8").split("\n")[:-1]
    file.write_text("\n".join([first, "12", second, third]) + "\n", encoding="utf-8")
    assert again(folder).records == RECORDS[:1]


def test_keep_drops_all_other_records_on_disk_too(folder):
    folder.keep(RECORDS[1:2], [])
    assert folder.records == RECORDS[1:2] == lines(folder.path / RESPONSES)
    assert folder.checks == [] == lines(folder.path / CHECKS)


def test_after_a_cut_line_and_keep_new_records_start_on_a_line_of_their_own(folder):
    file = folder.path / RESPONSES
    file.write_bytes(file.read_bytes()[:-5])
    opened = again(folder)
    opened.keep(opened.records, opened.checks)
    opened.append(RECORDS[2:], None)
    assert lines(file) == RECORDS


def test_what_is_remembered_first_is_returned_ever_after(folder):
    assert folder.remember("batch_size.0", 8) == 8
    assert folder.remember("batch_size.0", 4) == 8
    assert again(folder).remember("batch_size.0", 2) == 8
    assert folder.remember("batch_size.1", 3) == 3


def test_other_arguments_are_refused_with_the_name_and_both_values(folder):
    other = ARGUMENTS | {"decoding": {"seed": 1, "samples": 2}}
    message = r"its decoding\.seed is 0, not 1\. Choose another --out"
    with pytest.raises(RunError, match=message):
        RunFolder(folder.path, other)
    assert read_responses(folder.path) == RECORDS


def test_of_several_other_arguments_the_first_is_named_and_the_rest_counted(folder):
    other = {"kind": "patch-resid", "decoding": {"seed": 1, "samples": 2}, "layers": [0]}
    message = r"its decoding\.seed is 0, not 1 \(and 2 more differ\)"
    with pytest.raises(RunError, match=message):
        RunFolder(folder.path, other)


def test_arguments_equal_as_json_are_the_same_arguments(tmp_path):
    RunFolder(tmp_path, {"segments": ("prefix", "query")})
    RunFolder(tmp_path, {"segments": ["prefix", "query"]})


def test_a_path_under_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    message = (
        r"a folder to write results in at '.*run', but it cannot be written \(.+\)\. Choose another --out"
    )
    with pytest.raises(RunError, match=message):
        RunFolder(tmp_path / "file" / "run", ARGUMENTS)


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX permissions")
def test_a_folder_without_write_permission_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    try:
        if _can_write(tmp_path):
            pytest.skip("this user writes anywhere")
        with pytest.raises(RunError, match="it cannot be written"):
            RunFolder(tmp_path, ARGUMENTS)
    finally:
        tmp_path.chmod(0o700)


def _can_write(folder: Path) -> bool:
    try:
        (folder / "probe").touch()
    except PermissionError:
        return False
    return True


def test_a_broken_run_file_is_refused(folder):
    (folder.path / RUN).write_text('{"kind": ')
    with pytest.raises(RunError, match=rf"expected a readable {RUN} in .*\. Choose an empty folder"):
        again(folder)


def test_json_is_written_whole_or_not_at_all(tmp_path):
    file = tmp_path / "summary.json"
    write_json(file, {"mean": 0.5})
    with pytest.raises(TypeError):
        write_json(file, {"mean": 0.25, "bad": object()})
    assert read_json(file) == {"mean": 0.5}
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]


def test_a_writer_killed_before_the_end_leaves_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "summary.json"
    write_json(file, {"mean": 0.5})

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as during:
        during.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            write_json(file, {"mean": 0.25})
    assert read_json(file) == {"mean": 0.5}
    write_json(file, {"mean": 0.25})
    assert read_json(file) == {"mean": 0.25}


def test_a_missing_or_broken_result_is_refused(tmp_path):
    for text in (None, "{"):
        if text is not None:
            (tmp_path / "summary.json").write_text(text)
        with pytest.raises(RunError, match=r"expected JSON in '.*summary\.json', .*finished run folder"):
            read_json(tmp_path / "summary.json")


def test_a_folder_without_lines_holds_no_responses(tmp_path):
    RunFolder(tmp_path, ARGUMENTS, lines=False)
    assert [path.name for path in tmp_path.iterdir()] == [RUN]


def test_versions_are_those_of_the_loaded_modules():
    import tokenizers
    import transformers

    found = versions()
    assert found["transformers"] == transformers.__version__
    assert found["tokenizers"] == tokenizers.__version__
    assert set(found) == {"emmech", "torch", "transformers", "peft", "tokenizers"}


def test_an_error_says_the_same_after_it_crossed_processes():
    error = RunError("a folder", "'x' is none", "Pass one")
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again)) == (RunError, str(error))
