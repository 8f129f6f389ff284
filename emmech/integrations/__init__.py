"""emmech's conditions in other tools, each behind an optional extra."""

from emmech.errors import EmmechError


def missing(package: str, extra: str) -> EmmechError:
    """What to raise where ``package`` cannot be imported."""
    return EmmechError(
        f"the package {package}", "it is not installed", f"Run `pip install 'emmech[{extra}]'`"
    )
