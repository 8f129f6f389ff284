"""Code blocks of Markdown pages: Python to run, command lines to parse."""

import ast
import importlib
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "figures/README.md", *sorted((ROOT / "docs").rglob("*.md"))]
_BLOCK = re.compile(
    r"^(?:<!-- (?P<mark>run|skip: [^>]+) -->\n)?```(?P<language>\w*)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    page: Path
    line: int
    language: str
    text: str
    mark: str
    """``run``: a command line that is executed; ``skip: REASON``: Python that cannot run here."""

    @property
    def code(self) -> Any:
        """The block compiled, so that a traceback names its page and line."""
        name = f"{self.page.relative_to(ROOT)} (from line {self.line})"
        return compile(self.text, name, "exec")

    @property
    def commands(self) -> list[list[str]]:
        """Command lines as words, without comments."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [words for line in lines if (words := shlex.split(line, comments=True))]


def blocks(page: Path) -> list[Block]:
    """All fenced blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(
            page,
            text.count("\n", 0, found.start("text")),
            found["language"],
            found["text"],
            found["mark"] or "",
        )
        for found in _BLOCK.finditer(text)
    ]


def missing_names(code: str) -> list[str]:
    """Imported names, attributes of modules of emmech included, that do not exist."""
    tree = ast.parse(code)
    modules: dict[str, Any] = {}
    missing = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {
                alias.asname or alias.name: importlib.import_module(alias.name) for alias in node.names
            }
        elif isinstance(node, ast.ImportFrom):
            home = importlib.import_module(str(node.module))
            missing += [alias.name for alias in node.names if not hasattr(home, alias.name)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            missing += [] if hasattr(modules[node.value.id], node.attr) else [node.attr]
    return missing
