"""``python -m benchmarks [names]``: measure, print the tables with aims, keep the numbers.

    python -m benchmarks                        all, on the embedded model
    python -m benchmarks sweep generation       some; the results of the others stay
    python -m benchmarks --device cuda --dtype bfloat16 --shape 8b

Writes benchmarks/results.json (results-SHAPE-DTYPE.json for what was asked for) and a page, report.html,
in --folder.
"""

import argparse
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from rich.console import Console

from benchmarks import page
from benchmarks.measure import Row, code, machine, release, table
from benchmarks.setting import SHAPES, Setting
from emmech.models.default import DEFAULT_MODEL
from emmech.results import read_json, write_json

NAMES = (
    "sweep", "long_prefix", "one_answer", "attribution", "generation", "growth", "training", "loading"
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the named benchmarks, one module of this package each."""
    parser = _parser()
    chosen = parser.parse_args(arguments)
    if unknown := set(chosen.names) - set(NAMES):
        parser.error(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}")
    setting = Setting.make(chosen.shape, chosen.device, chosen.dtype, chosen.repeats, chosen.folder)
    name = "results" if setting.name == DEFAULT_MODEL else f"results-{setting.name}"
    path = (chosen.results or Path(__file__).parent) / f"{name}.json"
    console = Console(width=140)
    of_code = code()
    for benchmark in chosen.names or NAMES:
        release()
        rows = import_module(f"benchmarks.{benchmark}").measure(setting)
        facts = {"shape": setting.shape, "device": setting.device, "dtype": setting.dtype}
        results: dict[str, Row] = read_json(path) if path.exists() else {}
        results[benchmark] = {
            "setting": facts | {"repeats": setting.repeats},
            "code": of_code,
            "machine": machine(),
            "rows": rows,
        }
        write_json(path, {one: results[one] for one in NAMES if one in results})
        console.print(table(benchmark, rows))
    print(f"{path}\n{page.write(chosen.folder, read_json(path))}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Speed and memory.")
    parser.add_argument("names", nargs="*", help=f"of {', '.join(NAMES)}; all")
    parser.add_argument("--shape", default=DEFAULT_MODEL, choices=[DEFAULT_MODEL, *SHAPES])
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--dtype", help="of everything; float32 for sweeps, the loader's choice for the rest")
    parser.add_argument("--repeats", type=int, default=3, help="turns of what is compared")
    parser.add_argument("--folder", type=Path, default=Path("runs/bench"), help="models, maps and the page")
    parser.add_argument("--results", type=Path, help="folder of the results; benchmarks/ by default")
    return parser


if __name__ == "__main__":
    main()
