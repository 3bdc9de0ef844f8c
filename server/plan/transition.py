"""From a state and a round's outcome to the next state."""

from __future__ import annotations

from server.plan.end import after_anchor, opinionated
from server.plan.shift import after_advise, after_look, after_tally
from server.plan.state import Outcome, Plan, RunState
from server.plan.whole import after_consolidate, after_grow, after_judge, after_weigh


def advance(plan: Plan, state: RunState, outcome: Outcome) -> RunState:
    """Return the state after a round."""
    steps = {
        "look": after_look,
        "grow": after_grow,
        "tally": after_tally,
        "advise": after_advise,
        "weigh": after_weigh,
        "consolidate": after_consolidate,
        "judge": after_judge,
        "anchor": after_anchor,
    }
    return steps[state.phase](plan, state, outcome)


def rounds_left(plan: Plan, state: RunState) -> int:
    """Return how many rounds are still to play if nothing is refused from here on.

    No more than a guess where shifts are looked for: a step that begins with a look is counted as
    one without a shift.
    """
    config = plan.config
    if state.done:
        return 0
    looks = 0 if state.memory is None else 1
    if state.way == "expert":
        growing = config.rounds - (state.round if state.phase == "grow" else 0)
        growing = 1 if state.phase == "tally" else growing + (config.opinion_weight > 0)
        growing += state.phase == "look"
        return growing + (config.steps - state.step) * (looks + config.rounds)
    of_step = {"look": looks, "grow": config.rounds}
    if config.freeing not in ("prior", "never") or state.step == 0:
        of_step |= {"weigh": 1, "consolidate": config.consolidate_rounds, "judge": 1}
    if opinionated(plan, state):
        of_step |= {"tally": 1, "advise": 1}
    if config.ewc_weight:
        of_step["anchor"] = 1
    phases = list(of_step)
    here = phases.index(state.phase)
    rest = sum(of_step[phase] for phase in phases[here:]) - state.round
    without_last = 1 if "anchor" in of_step else 0
    return rest + (config.steps - state.step) * sum(of_step.values()) - without_last
