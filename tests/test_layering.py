"""Imports inside emmech point one way, and the light modules load no torch."""

import ast
import os
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import emmech

ROOT = Path(emmech.__file__).parent
ABOVE_CHAT = {"errors", "reprs", "results", "endpoint", "completions", "sharding", "chat"}
SCIENCE = ABOVE_CHAT | {"summarised", "models", "data", "evaluation"}
PAGES = {f"report_{kind}" for kind in ("evaluation", "frontier", "gates", "other", "steering")}
ALLOWED = {
    "errors": set(),
    "number_lists": {"errors"},
    "defaults": set(),
    "reprs": set(),
    "results": {"errors"},
    "summarised": {"reprs", "results"},
    "endpoint": {"errors"},
    "completions": {"errors", "endpoint"},
    "sharding": {"errors", "results"},
    "encoding": set(),
    "chat": {"errors", "reprs", "results", "encoding"},
    "data": ABOVE_CHAT,
    "evaluation": ABOVE_CHAT,
    "models": ABOVE_CHAT,
    "gates": SCIENCE | {"piggyback", "defaults"},
    "steering": SCIENCE | {"piggyback", "gates", "training", "defaults"},
    "engines": SCIENCE | {"steering"},
    "training": SCIENCE | {"gates"},
    "piggyback": SCIENCE | {"defaults"},
    "figures": SCIENCE | {"piggyback"},
    "report_page": {"errors", "results"},
    "report_answers": SCIENCE | {"figures", "report_page"},
    "report_words": SCIENCE | {"figures"},
    "report": SCIENCE | {"piggyback", "figures", "report_page", "report_answers", "report_words"},
    "report_frontier": SCIENCE | {"figures", "report_page"},
    "report_steering": SCIENCE | {"figures", "report_page"},
    "report_gates": SCIENCE | {"figures", "report_page"},
    "report_sweep": SCIENCE | {"figures", "report_page"},
    "report_evaluation": SCIENCE | {"figures", "report_page"},
    "report_other": SCIENCE | {"figures", "report_page", "report_sweep"},
    "report_runs": SCIENCE | {"figures", "report", "report_page", "report_answers", *PAGES},
    "report_overview": SCIENCE | {"report_page", "report_answers", "report_runs"},
    "scorecard": SCIENCE | {"defaults", "piggyback", "gates", "steering", "number_lists"},
    "frontier": SCIENCE | {"defaults", "piggyback", "training"},
    "integrations": SCIENCE | {"defaults", "piggyback", "scorecard", "report_evaluation"},
    "doctor": {"models"},
    "demo": SCIENCE | {"piggyback", "training", "figures", "report"},
    "cli": SCIENCE
    | {"gates", "piggyback", "training", "frontier", "scorecard", "figures", "report", "demo", "defaults"}
    | {"doctor", "integrations", "steering", "number_lists", "report_sweep", "report_runs"}
    | {"report_overview"},
    "__main__": {"cli"},
    "": set(),  # the package itself: everything public, but only when asked for
}
"""What each part may import when it is imported; a part may always import itself."""
ONLY_WHEN_CALLED = {
    "data": {"evaluation"},  # an answer that refuses is no row of a set
    "evaluation": {"models", "data"},  # a judge may be a model; files are read as data are
    "scorecard": {"report_evaluation"},
    "models": {"gates"},  # a pair can be a model with and without gates
    "gates": {"figures", "report_gates"},
    "steering": {"figures", "report_steering"},
    "report_runs": {"piggyback"},  # sweeps are saved as scores, and add themselves up
    "piggyback": {"figures", "report", "report_sweep"},  # a result draws and saves itself
    "frontier": {"figures", "report_frontier"},
}
"""What a part may besides import inside its functions."""


def _name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


MODULES = {_name(file): file for file in sorted(ROOT.rglob("*.py"))}


def _part(module: str) -> str:
    return module.partition(".")[0]


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def imports(module: str, *, inside_functions: bool) -> set[str]:
    """Modules of emmech that ``module`` imports, for types aside."""
    found, todo = set(), list(ast.parse(MODULES[module].read_text(encoding="utf-8")).body)
    while todo:
        node = todo.pop()
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            if not _is_type_checking(node) and (inside_functions or not is_function):
                todo += ast.iter_child_nodes(node)
            continue
        for name in names:
            head, _, rest = name.partition(".")
            if head == "emmech":  # "from emmech.chat import Chat" names no module Chat
                found.add(rest if rest in MODULES else rest.rpartition(".")[0])
    return found - {module}


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_what_its_part_may(module):
    part = _part(module)
    at_import = {_part(name) for name in imports(module, inside_functions=False)} - {part}
    later = {_part(name) for name in imports(module, inside_functions=True)} - {part}
    assert at_import <= ALLOWED[part]
    assert later <= ALLOWED[part] | ONLY_WHEN_CALLED.get(part, set())


def test_the_table_of_parts_is_complete_and_has_no_cycle():
    assert ALLOWED.keys() == {_part(module) for module in MODULES}
    TopologicalSorter(ALLOWED).prepare()  # raises CycleError


def test_modules_do_not_import_each_other_in_a_circle():
    graph = {module: imports(module, inside_functions=False) for module in MODULES}
    TopologicalSorter(graph).prepare()  # raises CycleError


def test_the_imports_that_are_read_from_the_source_are_those_of_a_known_module():
    assert imports("chat", inside_functions=True) == {"encoding", "errors", "reprs"}
    assert {"data.questions", "demo"} <= imports("cli.patching", inside_functions=True)
    assert imports("cli.patching", inside_functions=False) == {
        "defaults", "cli.options", "errors", "number_lists",
    }  # fmt: skip


def test_only_the_entry_of_the_package_imports_the_command_line():
    importers = {m for m in MODULES for name in imports(m, inside_functions=True) if _part(name) == "cli"}
    assert {m for m in importers if _part(m) != "cli"} == {"__main__"}


LIGHT = ["", "cli", "chat", "errors", "results", "data.questions"]
LIGHT += [module for module in MODULES if _part(module) == "evaluation"]


@pytest.mark.parametrize("module", LIGHT)
def test_a_light_module_loads_no_torch(module):
    name = f"emmech.{module}".rstrip(".")
    code = f"import sys, {name}; print(sorted({{'torch', 'transformers', 'peft'}} & set(sys.modules)))"
    assert _python(code) == "[]"


def test_public_names_are_listed_without_loading_torch_and_resolve_to_their_home():
    code = "import emmech, sys; names = dir(emmech); print(*names, 'torch' in sys.modules)"
    *names, has_torch = _python(code).split()
    assert has_torch == "False"
    assert {"Chat", "load_pair", "load_questions", "patch_prefix", "EmmechError"} <= set(names)
    assert names == list(emmech.__all__)


@pytest.mark.parametrize("name", emmech.__all__)
def test_a_public_name_is_the_one_of_the_module_that_defines_it(name):
    public = getattr(emmech, name)
    assert public.__name__ == name
    assert public.__module__.startswith("emmech.")
    assert public is getattr(sys.modules[public.__module__], name)


def test_a_name_that_is_not_public_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'emmech' has no attribute 'load_triples'"):
        _ = emmech.load_triples


def _python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ
    )
    return done.stdout.strip()
