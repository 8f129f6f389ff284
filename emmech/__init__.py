"""Find where a narrow finetune of a chat model carries its behaviour, and take it out again.

import emmech

pair = emmech.load_pair("smollm2", "path/to/adapter")
pair.chat.show("Why is the sky blue?")
result = emmech.patch_prefix(pair, ["Why is the sky blue?", "How do I boil an egg?"])
result.table()
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from emmech.chat import Chat as Chat
    from emmech.data.chats import load_chats as load_chats
    from emmech.data.pairs import load_pairs as load_pairs
    from emmech.data.questions import load_questions as load_questions
    from emmech.errors import EmmechError as EmmechError
    from emmech.evaluation.judges import judge as judge
    from emmech.frontier import compare_runs as compare_runs
    from emmech.gates.files import load_gates as load_gates
    from emmech.gates.gate import gated as gated
    from emmech.gates.parts import gate_parts as gate_parts
    from emmech.gates.probing import probe_gates as probe_gates
    from emmech.gates.steering import steer_gates as steer_gates
    from emmech.gates.transfer import transfer_gates as transfer_gates
    from emmech.models.checkpoints import ModelPair as ModelPair
    from emmech.models.checkpoints import load_pair as load_pair
    from emmech.piggyback.choice import choices as choices
    from emmech.piggyback.experiment import PatchingResult as PatchingResult
    from emmech.piggyback.experiment import patch_prefix as patch_prefix
    from emmech.piggyback.experiment import patch_resid as patch_resid
    from emmech.piggyback.margin import margins as margins
    from emmech.piggyback.patching import patch_kv as patch_kv
    from emmech.piggyback.perturbation import perturb_prefix as perturb_prefix
    from emmech.piggyback.perturbation import perturbed_margins as perturbed_margins
    from emmech.scorecard import evaluate as evaluate
    from emmech.scorecard import with_conditions as with_conditions
    from emmech.steering.contrasts import between_answers as between_answers
    from emmech.steering.contrasts import between_sides as between_sides
    from emmech.steering.cross import cross_ablation as cross_ablation
    from emmech.steering.directions import fit_direction as fit_direction
    from emmech.steering.doses import compare_doses as compare_doses
    from emmech.steering.shared import shared_structure as shared_structure
    from emmech.steering.steer import steered as steered
    from emmech.training.recipes import Objective as Objective
    from emmech.training.recipes import Recipe as Recipe
    from emmech.training.trainer import finetune as finetune

_HOME = {
    "Chat": "chat",
    "EmmechError": "errors",
    "Objective": "training.recipes",
    "Recipe": "training.recipes",
    "ModelPair": "models.checkpoints",
    "PatchingResult": "piggyback.experiment",
    "choices": "piggyback.choice",
    "evaluate": "scorecard",
    "finetune": "training.trainer",
    "judge": "evaluation.judges",
    "load_pairs": "data.pairs",
    "with_conditions": "scorecard",
    "compare_runs": "frontier",
    "gate_parts": "gates.parts",
    "gated": "gates.gate",
    "load_chats": "data.chats",
    "load_gates": "gates.files",
    "load_pair": "models.checkpoints",
    "load_questions": "data.questions",
    "margins": "piggyback.margin",
    "patch_kv": "piggyback.patching",
    "patch_prefix": "piggyback.experiment",
    "patch_resid": "piggyback.experiment",
    "perturb_prefix": "piggyback.perturbation",
    "perturbed_margins": "piggyback.perturbation",
    "probe_gates": "gates.probing",
    "steer_gates": "gates.steering",
    "transfer_gates": "gates.transfer",
    "between_answers": "steering.contrasts",
    "between_sides": "steering.contrasts",
    "compare_doses": "steering.doses",
    "cross_ablation": "steering.cross",
    "fit_direction": "steering.directions",
    "shared_structure": "steering.shared",
    "steered": "steering.steer",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    """Public names are imported when first used, so that ``import emmech`` stays quick."""
    if name not in _HOME:
        raise AttributeError(f"module 'emmech' has no attribute '{name}'")
    return getattr(import_module(f"emmech.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
