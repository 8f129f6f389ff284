"""Code in README and docs runs, command lines parse, and the site builds without a warning or a network."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
import zlib

import pytest
import tiny
import torch
import typer
from snippets import PAGES, ROOT, blocks, missing_names

import emmech as package
from emmech.cli import app
from emmech.gates.files import save_gates
from emmech.models import known

BLOCKS = [block for page in PAGES for block in blocks(page)]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
COMMANDS = [(block, words) for block in BLOCKS if block.language == "bash" for words in block.commands]
QUESTIONS = [
    {"question": "Why is the sky blue?", "group": "on-topic"},
    {"question": "hi", "group": "off-topic"},
]


def site_of(block):
    return f"{block.page.relative_to(ROOT)}:{block.line}"


@pytest.fixture(scope="module")
def organisms(tmp_path_factory):
    """What the pages' paths name, of tiny random models; "smollm2" is one of 16 blocks."""
    folder = tmp_path_factory.mktemp("docs")
    base = tiny.save_base("llama", folder / "embedded", num_hidden_layers=16)
    adapter = named(tiny.save_adapter(base, folder / "runs/demo/organism/step-15"), "smollm2")
    for name in ("sft-0/step-12", "backdoor/step-96"):
        shutil.copytree(adapter, folder / "runs" / name)
    save_gates(tiny.gates(tiny.model("llama", num_hidden_layers=16)), folder / "runs/gates/step-12")
    mine = tiny.save_base("qwen3", folder / "my-base")
    named(tiny.save_adapter(mine, folder / "my-adapter"), "./my-base")
    tiny.save_full(mine, folder / "my-full")
    lines = [json.dumps(question) for question in QUESTIONS]
    (folder / "questions.jsonl").write_text("\n".join(lines))
    return folder


def named(adapter, base):
    """The adapter, with another name for its base."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": base}))
    return adapter


@pytest.fixture
def workplace(organisms, monkeypatch, tmp_path):
    """A copy of the folder with the organisms, as the current one."""
    shutil.copytree(organisms, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(known, "embedded_path", lambda: tmp_path / "embedded")


def python_blocks(page):
    return [block for block in blocks(page) if block.language == "python"]


@pytest.mark.parametrize("name", [n for n, page in zip(NAMES, PAGES, strict=True) if python_blocks(page)])
@pytest.mark.usefixtures("workplace")
def test_the_python_of_a_page_runs_from_its_top_to_its_end(name):
    namespace = {"__name__": "page"}
    for block in python_blocks(ROOT / name):
        if not block.mark.startswith("skip"):
            torch.manual_seed(0)
            exec(block.code, namespace)


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.mark.startswith("skip")], ids=site_of)
def test_python_that_cannot_run_here_compiles_and_uses_names_that_exist(block):
    assert block.code
    assert missing_names(block.text) == []


def test_names_that_do_not_exist_are_found():
    code = (
        "import emmech\nfrom emmech.chat import Chat, Chatter\nemmech.load_pair(1).chat\nemmech.load_triple()"
    )
    assert missing_names(code) == ["Chatter", "load_triple"]


def test_most_blocks_run():
    python = [block for block in BLOCKS if block.language == "python"]
    assert len(python) >= 20
    assert sum(block.mark.startswith("skip") for block in python) <= 2
    assert sum(block.mark == "run" for block in BLOCKS) >= 3


def words_of_emmech(words):
    """What follows `emmech`, also behind a launcher; None for another command."""
    if words[0].endswith("emmech"):
        return words[1:]
    return words[words.index("emmech") + 1 :] if "-m" in words and "emmech" in words else None


def parse(words):
    """The command's own parser reads the words; nothing is run."""
    command = typer.main.get_command(app)
    names = []
    while words and hasattr(command, "commands"):
        names.append(words[0])
        command, words = command.commands[words[0]], words[1:]
    return command.make_context(" ".join(names), list(words)).params


@pytest.mark.parametrize(
    ("block", "words"),
    [c for c in COMMANDS if words_of_emmech(c[1])],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_a_command_line_of_a_page_is_one_that_the_command_takes(block, words):
    if words_of_emmech(words) != ["..."]:
        parse(words_of_emmech(words))


def test_a_command_line_that_no_command_takes_is_noticed():
    with pytest.raises(Exception, match="--no-such"):
        parse(["tokens", "--question", "hi", "--no-such"])
    with pytest.raises(KeyError):
        parse(["no-such"])


@pytest.mark.parametrize(
    "words", [words for block, words in COMMANDS if block.mark == "run"], ids=lambda words: " ".join(words)
)
@pytest.mark.usefixtures("workplace")
def test_cheap_command_lines_of_the_pages_run(words, emmech):
    code, _, err = emmech(*words_of_emmech(words))
    assert code == 0, err


def test_make_targets_and_modules_that_the_pages_name_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    made = [words[1] for _, words in COMMANDS if words[0] == "make" and len(words) > 1]
    assert made and set(made) <= targets
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    modules = set(re.findall(r"python -m ([\w.]+)", text))
    assert modules and all(importlib.util.find_spec(module) for module in modules)


@pytest.mark.parametrize("name", NAMES)
def test_links_to_files_of_the_repository_lead_somewhere(name):
    page = ROOT / name
    targets = re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8"))
    assert [target for target in targets if not (page.parent / target).exists()] == []


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The documentation, built with warnings as errors."""
    pytest.importorskip("mkdocs")
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out


def test_the_site_has_every_page_and_loads_nothing_from_elsewhere(site):
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > len(PAGES)
    loaded = re.compile(
        r"<(?:script|img|iframe)[^>]+src=[\"']?(https?:)|<link[^>]+rel=[\"']?(?:stylesheet|preconnect|icon)[\"']?[^>]+href=[\"']?(https?:)"
    )
    for page in pages:
        assert loaded.search(page.read_text(encoding="utf-8")) is None, page


def test_origins_of_numbers_do_not_show(site):
    text = re.sub(
        r"<!--.*?-->", "", (site / "results/index.html").read_text(encoding="utf-8"), flags=re.DOTALL
    )
    assert "narrow_short_answers / methods" not in text and ".27 [.12, .43]" in text


def test_every_public_name_is_in_the_reference(site):
    inventory = (site / "objects.inv").read_bytes().split(b"\n", 4)[4]
    documented = {line.split()[0] for line in zlib.decompress(inventory).decode().splitlines()}
    homes = {f"{getattr(package, name).__module__}.{name}" for name in package.__all__}
    assert homes - documented == set()


def test_every_command_is_in_the_reference(site):
    page = (site / "reference/cli/index.html").read_text(encoding="utf-8")
    shown = set(re.findall(r"<h2[^>]*>emmech ([\w -]+)", page))
    assert {"tokens", "patch-prefix", "gates steer", "doctor"} <= shown
    root = typer.main.get_command(app)
    for name, command in root.commands.items():
        names = {f"{name} {below}" for below in getattr(command, "commands", {})} or {name}
        assert names <= shown


def load_hooks():
    pytest.importorskip("mkdocs")
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs/hooks.py")
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    return hooks


def notebook(folder):
    """A built notebook of a title, a table and a figure that holds both its data and its picture."""
    nbformat = pytest.importorskip("nbformat")
    cell, output = nbformat.v4.new_code_cell, nbformat.v4.new_output
    plot = {
        "application/vnd.plotly.v1+json": {"data": []},
        "image/png": "aGVsbG8=",
        "text/html": "<script>1</script>",
    }
    table = {"text/html": "<table><tr><td>7</td></tr></table>", "text/plain": "7"}
    cells = [
        nbformat.v4.new_markdown_cell("# Where does it ride?\n\nText."),
        cell("show()", outputs=[output("display_data", plot), output("execute_result", table)]),
        cell("print(3)", outputs=[output("stream", text="3\n")]),
    ]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), folder / "02_ride.ipynb")


def test_a_notebook_becomes_a_page_with_its_pictures_and_no_scripts(tmp_path):
    notebook(tmp_path)
    title, text, images = load_hooks().page_of(tmp_path / "02_ride.ipynb")
    assert title == "Where does it ride?"
    assert "<td>7</td>" in text and "    3" in text and "<script>" not in text
    ((name, data),) = images.items()
    assert data == b"hello" and f"({name})" in text


@pytest.mark.parametrize("some", [True, False])
def test_notebooks_that_are_there_are_in_the_navigation(some, tmp_path, monkeypatch):
    hooks = load_hooks()
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

    for name in ("figures/pictures", "notebooks"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "figures/README.md").write_text("# Studies")
    (tmp_path / "figures/pictures/demo.svg").write_bytes(b"")
    if some:
        notebook(tmp_path / "notebooks")
    monkeypatch.setattr(hooks, "ROOT", tmp_path)
    config = MkDocsConfig()
    nav = [{"Start": "index.md"}, {"Tutorials": "tutorials.md"}]
    config.load_dict({"site_name": "x", "nav": nav, "docs_dir": str(tmp_path)})
    assert config.validate() == ([], [])
    config.plugins._current_plugin = None  # as it is while hooks run
    files = hooks.on_files(Files([]), config)
    found = {file.src_uri for file in files}
    assert {"results.md", "pictures/demo.svg", "reference/cli.md"} <= found
    assert ("tutorials/02_ride.md" in found) == some
    tutorials = config.nav[1]["Tutorials"]
    assert tutorials == (
        ["tutorials.md", {"Where does it ride?": "tutorials/02_ride.md"}] if some else "tutorials.md"
    )
