"""The same sweeps of one answer to a question, where no reading of the question is shared."""

from benchmarks import long_prefix
from benchmarks.measure import Aim, Row, release
from benchmarks.setting import REFUSAL, Setting
from benchmarks.sweep import Bench

METRIC = f"target:{REFUSAL}"


def measure(setting: Setting) -> list[Row]:
    """Rows at the template's own prefix, then at the long one."""
    rows = []
    for n_prefix, aim in ((None, 4.0), (long_prefix.N_TOKENS, 20.0)):
        rows += Bench(setting, n_prefix, METRIC).rows(Aim(aim))
        release()
    return rows
