"""One pure function per figure: the summary of a run -> a plotly Figure.

    condition_bars(summary).show()

The title states what was found, the subtitle what the marks are. Nothing here computes a statistic,
except the reading of the plain line in `frontier`, which is linear between two steps.
"""

from emmech.figures.cross import cross_finding, cross_matrix
from emmech.figures.evaluation import (
    capability_changes,
    capability_cost,
    judge_agreement,
    metric_bars,
    metric_finding,
)
from emmech.figures.gate_probing import gate_activity, overlap_curve, readout_curves
from emmech.figures.gates import dose_response, steering_finding, transfer_finding, transfer_matrix
from emmech.figures.house import COLORS, Row, Summary, as_estimate
from emmech.figures.patching import (
    RESID,
    condition_bars,
    finding,
    groups_of,
    headline,
    layer_curve,
    metric_rows,
    quantity,
    restored_curves,
)
from emmech.figures.perturbation import perturbation_strip
from emmech.figures.search import search_finding, search_map, strongest
from emmech.figures.steering import (
    direction_curve,
    doses_finding,
    methods_at_cost,
    middle,
    shared_finding,
    shared_matrix,
)
from emmech.figures.sweep import attribution_scatter, set_sizes, sweep_finding, sweep_map
from emmech.figures.tokens import gate_tokens, projections_of, token_values
from emmech.figures.tradeoff import early_stopping, frontier, frontier_of_methods, methods_finding
from emmech.figures.training import training_drift, training_loss

__all__ = [
    "COLORS",
    "RESID",
    "Row",
    "Summary",
    "as_estimate",
    "attribution_scatter",
    "capability_changes",
    "capability_cost",
    "condition_bars",
    "cross_finding",
    "cross_matrix",
    "direction_curve",
    "dose_response",
    "doses_finding",
    "early_stopping",
    "finding",
    "frontier",
    "frontier_of_methods",
    "gate_activity",
    "gate_tokens",
    "groups_of",
    "headline",
    "judge_agreement",
    "layer_curve",
    "methods_at_cost",
    "methods_finding",
    "metric_bars",
    "metric_finding",
    "metric_rows",
    "middle",
    "overlap_curve",
    "perturbation_strip",
    "projections_of",
    "quantity",
    "readout_curves",
    "restored_curves",
    "search_finding",
    "search_map",
    "set_sizes",
    "shared_finding",
    "shared_matrix",
    "steering_finding",
    "strongest",
    "sweep_finding",
    "sweep_map",
    "token_values",
    "training_drift",
    "training_loss",
    "transfer_finding",
    "transfer_matrix",
]
