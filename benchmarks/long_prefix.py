"""The same sweep behind a long system message, where one forward per cell reads the prefix every time."""

from benchmarks.measure import Aim, Row
from benchmarks.setting import Setting
from benchmarks.sweep import Bench

N_TOKENS = 256


def measure(setting: Setting) -> list[Row]:
    """Rows as of the sweep at the template's own prefix."""
    return Bench(setting, N_TOKENS).rows(Aim(20.0))
