"""Ratios of times that were taken in turn, with the aim beside them.

    times = alternated({"theirs": theirs, "ours": ours}, repeats=3)
    row = ratio("theirs / ours", times["theirs"], times["ours"], Aim(4.0))

Machines are noisy: functions are called in turn, a ratio is that of medians, and ``low`` and ``high`` are
the least and the largest ratio within one turn. ``cpu`` is the ratio of processor seconds, which other
programs on the machine change less. Read the ratios, not the seconds.
"""

import gc
import os
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, NamedTuple

import psutil
import torch
from rich.table import Table
from torch import nn

Row = dict[str, Any]
PEERS = ("transformer-lens", "nnsight", "pyvene", "accelerate")
COPIES = 2.5
"""Of a model, the memory that a tool must find free: two plain copies, and what it computes."""


@dataclass(frozen=True)
class Aim:
    """What a number should reach at least (``higher``), or stay within (``lower``)."""

    value: float
    better: Literal["higher", "lower"] = "higher"

    def met(self, found: float) -> bool:
        """Whether a number is as good as that."""
        return found >= self.value if self.better == "higher" else found <= self.value


class Seconds(NamedTuple):
    """What a call took: by the clock, and of all processor cores together."""

    wall: float
    cpu: float


def timed(function: Callable[[], object]) -> Seconds:
    """The time of a call, work that a GPU still has to do included."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    wait()
    return Seconds(time.perf_counter() - wall, time.process_time() - cpu)


def alternated(functions: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[Seconds]]:
    """The time of each function, all of them called in turn; they should have run once before."""
    times: dict[str, list[Seconds]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            times[name].append(timed(function))
    return times


def ratio(
    name: str,
    above: Sequence[Seconds],
    below: Sequence[Seconds],
    aim: Aim | None = None,
    *,
    scale: float = 1.0,
    **facts: Any,
) -> Row:
    """One row: ``scale`` times the median of ``above`` over that of ``below``, turn by turn its range."""
    turns = [scale * a.wall / b.wall for a, b in zip(above, below, strict=True)]
    wall, cpu = (scale * middle(above, kind) / middle(below, kind) for kind in ("wall", "cpu"))
    return number(name, wall, aim, low=min(turns), high=max(turns), cpu=cpu, **facts)


def middle(times: Sequence[Seconds], kind: Literal["wall", "cpu"] = "wall") -> float:
    """The median of some calls."""
    return statistics.median(getattr(one, kind) for one in times)


def number(name: str, found: float, aim: Aim | None = None, **facts: Any) -> Row:
    """One row of a number that may have an aim, and of further facts."""
    aimed = {} if aim is None else {"aim": aim.value, "better": aim.better, "met": aim.met(found)}
    rounded = {key: round(value, 4) if isinstance(value, float) else value for key, value in facts.items()}
    return {"name": name, "value": round(found, 4), **aimed, **rounded}


def not_measured(name: str, why: str) -> Row:
    """A row for what is not there to compare with."""
    return {"name": name, "not_measured": why}


def installed(package: str) -> bool:
    """Whether a peer can be compared with."""
    return _version(package) is not None


def why_not(package: str, model: nn.Module) -> str | None:
    """Why a tool that needs a copy of each of the two models cannot be compared with; None where it can."""
    if not installed(package):
        return "not installed"
    size = sum(weight.numel() * weight.itemsize for weight in model.parameters())
    on_gpu = model.device.type == "cuda"
    free = torch.cuda.mem_get_info(model.device)[0] if on_gpu else psutil.virtual_memory().available
    return None if free > COPIES * size else f"two more copies of {size / 2**30:.0f} GiB do not fit"


def release() -> None:
    """Give back the memory of models that nothing refers to, for those that come next or elsewhere."""
    gc.collect()  # models of other tools refer to themselves
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def code() -> Row:
    """When numbers are taken, and of which code: the commit, where it is a repository's."""
    facts = {"date": datetime.now(UTC).date().isoformat()}
    if commit := _git("rev-parse", "--short", "HEAD"):
        changed = _git("status", "--porcelain", "--", "emmech", "benchmarks/*.py")
        facts["commit"] = commit + (" and changes" if changed else "")
    return facts


def machine() -> Row:
    """What numbers depend on besides the code."""
    facts: Row = {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "python": platform.python_version(),
    }
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    packages = ("emmech", "torch", "transformers", "peft", *PEERS)
    return facts | {package: found for package in packages if (found := _version(package)) is not None}


def table(title: str, rows: Iterable[Row]) -> Table:
    """Rows for the terminal: the number with its range, the aim, and whether it was met."""
    made = Table(title=title, title_justify="left", box=None, pad_edge=False)
    made.add_column("")
    for column in ("", "range", "cpu", "aim", ""):
        made.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        made.add_row(row["name"], *cells(row))
    return made


def cells(row: Row) -> tuple[str, ...]:
    """The number, its range, the ratio of processor seconds, the aim, and whether it was met."""
    if "not_measured" in row:
        return "-", "", "", "", f"not measured: {row['not_measured']}"
    spread = f"{row['low']:.2f} to {row['high']:.2f}" if "low" in row else ""
    shown = (f"{row['value']:.2f}", spread, f"{row['cpu']:.2f}" if "cpu" in row else "")
    if "aim" not in row:
        return *shown, "", ""
    sign = "≥" if row["better"] == "higher" else "≤"
    return *shown, f"{sign} {row['aim']:g}", "met" if row["met"] else "MISSED"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git(*arguments: str) -> str:
    """What git says of this repository; nothing where there is no git, or none of its repositories."""
    if (git := shutil.which("git")) is None:
        return ""
    root = Path(__file__).parents[1]
    return subprocess.run(
        [git, *arguments], cwd=root, capture_output=True, text=True, check=False
    ).stdout.strip()


def _cpu() -> str:
    """The processor's name, where Linux tells it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


_STATUS, _FORGET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def forget_peak() -> None:
    """Let the peak start from what is held now, where the system can (Linux, and GPUs)."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    if _FORGET.exists():
        _FORGET.write_text("5")


def peak_memory(device: torch.device | None = None) -> int:
    """Bytes held at most since the peak was forgotten, on a GPU if ``device`` is one.

    Resident ones; elsewhere than on Linux, those resident now.
    """
    if device is not None and device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if not _STATUS.exists():
        return psutil.Process().memory_info().rss
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
