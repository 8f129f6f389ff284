"""A default has one value, whichever way a user comes in."""

import inspect

import pytest

from emmech import defaults
from emmech.cli import patching
from emmech.piggyback import experiment, perturbation

RENAMED = {"segments", "layers", "out", "questions"}  # the shell passes these as text


@pytest.mark.parametrize(
    ("command", "function"),
    [
        (patching.patch_prefix, experiment.patch_prefix),
        (patching.patch_resid, experiment.patch_resid),
        (patching.perturb_prefix, perturbation.perturb_prefix),
    ],
)
def test_shell_and_python_have_the_same_defaults(command, function):
    shell, python = (inspect.signature(f).parameters for f in (command, function))
    shared = shell.keys() & python.keys() - RENAMED
    assert {"detector", "max_new_tokens", "seed", "batch_size"} <= shared
    for name in shared:
        given = shell[name].default
        assert getattr(given, "value", given) == python[name].default, name


@pytest.mark.parametrize(
    ("given", "samples", "used"), [(None, 1, 0), (None, 5, 1), (0.7, 5, 0.7), (0.0, 5, 0)]
)
def test_several_samples_are_drawn_and_a_single_one_is_greedy(given, samples, used):
    assert defaults.temperature(given, samples) == used
