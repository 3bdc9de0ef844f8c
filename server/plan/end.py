"""The end of a step: what it leaves, and whether another follows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from common.anchor import without
from common.filters import FreeSet, parameter_count
from common.memory import Memory
from common.state import State
from common.update import decode_scores, encode_scores
from server.plan.begin import begin_step, measuring
from server.plan.layouts import statistics_size
from server.plan.state import Outcome, Plan, RunState, StepOutcome


def end_step(
    plan: Plan,
    state: RunState,
    model: State,
    free: FreeSet,
    consolidated: float,
    refusal: str | None,
) -> RunState:
    """Return what follows a step: a second opinion for its model, or what `close_step` does."""
    outcome = StepOutcome(
        step=state.step,
        prior=state.heldout_prior,
        grown=state.heldout_grown,
        consolidated=consolidated,
        refusal=refusal,
        free=free,
        requested_share=plan.config.share,
        attempts=state.attempts,
        lambdas=state.lambdas,
        way=state.way,
    )
    if state.way == "whole" and refusal is None and state.memory is not None:
        # it was of another model
        state = replace(state, memory=replace(state.memory, opinion=None))
    gathering = replace(
        state,
        phase="tally",
        round=0,
        prior=model,
        base=model,
        free=free,
        next_free=FreeSet({}),
        values=None,
        shared=None,
        tail=None,
        source=None,
        pending=outcome,
    )
    if opinionated(plan, state) and statistics_size(plan, gathering) <= parameter_count(plan.net):
        return gathering
    return close_step(plan, state, model, free, outcome)


def opinionated(plan: Plan, state: RunState) -> bool:
    """Return whether a step that trains the whole net may end with a second opinion for it.

    Not where little is to travel: its statistics are several times a round of scope `rows`, and of
    a net with many channels they are more than the net itself.
    """
    wanted = plan.config.opinion_weight > 0 and "rows" not in plan.config.scopes
    return wanted and state.step > 0 and state.memory is not None and state.way == "whole"


def close_step(
    plan: Plan, state: RunState, model: State, free: FreeSet, outcome: StepOutcome
) -> RunState:
    """Return the begin of the next step, or the end."""
    refusal, finished = outcome.refusal, (*state.finished, outcome)
    memory = _after_training(state, refused=refusal is not None)
    seen = {c for c, count in enumerate(state.class_counts) if count and refusal is None}
    carried = replace(state.carried, known=tuple(sorted({*state.carried.known, *seen})))
    last = state.step >= plan.config.steps
    nothing = free.empty and carried.spare.empty
    if last or (nothing and "rows" in plan.config.scopes):
        stopped = None if last else _nothing_to_grow(plan)
        return replace(
            state,
            prior=model,
            free=free,
            values=None,
            finished=finished,
            done=True,
            pending=None,
            retry=None,
            allowed=0.0,
            stopped=stopped,
            memory=memory,
            carried=carried,
        )
    if carried.anchor is not None and state.way == "whole" and refusal is None:
        return measuring(plan, state.step, "anchor", model, free, finished, memory, carried)
    return begin_step(plan, state.step + 1, model, free, finished, memory, carried)


def after_anchor(plan: Plan, state: RunState, outcome: Outcome) -> RunState:
    """Add what the weights matter to this step's data, and begin the next step."""
    assert outcome.sums is not None
    assert state.carried.anchor is not None
    total = (state.carried.anchor + outcome.sums).astype(np.float32)
    carried = replace(state.carried, anchor=anchor_of(plan, state.prior, state.free, total))
    return begin_step(
        plan,
        state.step + 1,
        state.prior,
        state.free,
        state.finished,
        state.memory,
        carried,
    )


def anchor_of(plan: Plan, state: State, free: FreeSet, packed: np.ndarray) -> np.ndarray:
    """Return importances as the devices will decode them, zero at free filters."""
    packed = without(packed, plan.graph, free, state)
    if plan.config.codec_down == "fp32":
        return packed
    return decode_scores(encode_scores(packed), len(packed))


def _nothing_to_grow(plan: Plan) -> str:
    return (
        f"no filter could be freed within max-drop {plan.config.max_drop}, and scope 'rows' "
        "trains nothing else: raise max-drop, lower share or use scope 'group'"
    )


def _after_training(state: RunState, *, refused: bool) -> Memory | None:
    """Return the memory at the end of a step; training the whole net outdates class statistics."""
    memory = state.memory
    if memory is None or state.way != "whole" or refused or state.seen is None:
        return memory
    first = memory.worlds[0] + state.seen
    known = {*memory.known, *(c for c, n in enumerate(state.class_counts) if n)}
    return replace(
        memory, worlds=(first, *memory.worlds[1:]), known=tuple(sorted(known)), classes=None
    )
