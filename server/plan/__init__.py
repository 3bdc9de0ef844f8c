"""Steps and phases as a pure state machine: (plan, state, outcome) -> state.

A step begins with ``look``: statistics of the new images tell how to learn from them. Other
classes are learnt by statistics alone. Images of another world are learnt by an expert: ``grow``,
then ``tally``, class statistics of what it sees, for a second opinion beside its own classifier;
unless a classifier made of class statistics alone is then measured to be better.
Where nothing has shifted, the step goes ``grow`` (AOD) -> ``weigh`` (is the grown model better,
which filters matter) -> ``consolidate`` (SST + MSL) -> ``judge`` (is what freeing cost accepted),
back to ``consolidate`` with a smaller share where it is not. Class statistics of the new model
then make a second opinion beside its classifier (``tally``), unless that is worse (``advise``);
a model that freeing cost a little too much is judged again with it.
Step 0 exists only for a prior whose filters nobody has freed yet; it has no ``grow``.

No function here does I/O or draws a random number, so a checkpoint is the state.
"""

from server.plan.begin import start
from server.plan.end import anchor_of
from server.plan.layouts import (
    anneal_span,
    current_model,
    layout_of,
    scope_of,
    statistics_features,
    statistics_size,
)
from server.plan.order import crop_of, mirrors, order_of, wants_synthetic
from server.plan.state import Carried, Outcome, Plan, RunState, Scores, StepOutcome, Way
from server.plan.transition import advance, rounds_left
from server.plan.whole import score_slices

__all__ = [
    "Carried",
    "Outcome",
    "Plan",
    "RunState",
    "Scores",
    "StepOutcome",
    "Way",
    "advance",
    "anchor_of",
    "anneal_span",
    "crop_of",
    "current_model",
    "layout_of",
    "mirrors",
    "order_of",
    "rounds_left",
    "scope_of",
    "score_slices",
    "start",
    "statistics_features",
    "statistics_size",
    "wants_synthetic",
]
