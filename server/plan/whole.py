"""A step that trains the whole net: grow, weigh, consolidate, judge."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from common.config import Config
from common.filters import FilterGraph, FreeSet, common_part
from common.importance import bn_scale, choose, combine_ranks, random_scores
from common.layout import (
    Layout,
)
from common.order import Phase
from common.peers import peer
from common.seeds import numpy_rng
from common.sparsify import Attempt, smaller
from common.state import write_state
from server.plan.end import end_step, opinionated
from server.plan.layouts import current_model, layout_of, scope_of
from server.plan.shift import after_expert
from server.plan.state import Outcome, Plan, RunState
from server.plan.verdict import is_worse, tolerated


def after_grow(plan: Plan, state: RunState, outcome: Outcome) -> RunState:
    """Go on growing, or weigh what was grown."""
    config, done = plan.config, state.round + 1
    assert outcome.values is not None
    averaged = min(config.average, config.rounds)
    tail = _running_mean(state.tail, outcome.values, done - (config.rounds - averaged))
    if done == config.rounds:
        outcome, tail = replace(outcome, values=tail), None
    if done == config.rounds and state.way == "expert":
        grown = replace(state, values=outcome.values, tail=None)
        if config.opinion_weight:
            return replace(grown, phase="tally", round=0)
        return after_expert(plan, grown, outcome, None)
    if done == config.rounds and config.freeing in ("prior", "never"):
        return _after_last_grow(plan, state, outcome)
    more: Phase = "grow" if done < config.rounds else "weigh"
    following = replace(
        state,
        phase=more,
        round=done if more == "grow" else 0,
        values=outcome.values,
        tail=tail,
        class_counts=outcome.class_counts,
        kd_weight=_steer(config, state.kd_weight, outcome),
        lambdas=(*state.lambdas, state.kd_weight),
    )
    if more == "weigh" and state.peers > 1:
        return _best_peer(plan, following, outcome)
    if scope_of(plan, following) == scope_of(plan, state):
        return following
    return _repacked(plan, layout_of(plan, state), following)


def _best_peer(plan: Plan, state: RunState, outcome: Outcome) -> RunState:
    """Go on with the peer that was best on held-out images when the last round began."""
    assert state.values is not None
    best = int(np.argmax(outcome.peer_right))
    one = replace(state, base=peer(state.base, best), peers=1, best=best)
    size = layout_of(plan, one).size
    return replace(one, values=state.values[best * size : (best + 1) * size])


def _repacked(plan: Plan, was: Layout, state: RunState) -> RunState:
    """Return `state` with values in its own layout, of which `was` is a part."""
    layout = layout_of(plan, state)

    def pack(values: np.ndarray | None) -> np.ndarray | None:
        return None if values is None else layout.pack(was.unpack(state.base, values))

    return replace(state, values=pack(state.values), tail=pack(state.tail))


def _running_mean(tail: np.ndarray | None, values: np.ndarray, number: int) -> np.ndarray | None:
    """Return the mean of the last rounds' values, of which this is the `number`-th.

    Devices with skewed data pull each round's mean to and fro; the mean of the last few is
    better than the last (stochastic weight averaging, Izmailov et al., UAI 2018).
    """
    if number < 1:
        return None
    if tail is None:
        return values
    mean: np.ndarray = tail + (values - tail) / np.float32(number)
    return mean


def _after_last_grow(plan: Plan, state: RunState, outcome: Outcome) -> RunState:
    """End a step without freeing: nothing is weighed, and the grown model is taken as it is.

    Its accuracy on held-out images is that of the model with which the last round began.
    """
    grown = replace(
        state,
        values=outcome.values,
        heldout_prior=outcome.prior_right / outcome.heldout,
        heldout_grown=outcome.right / outcome.heldout,
        lambdas=(*state.lambdas, state.kd_weight),
    )
    model = current_model(plan, grown)
    if plan.config.freeing == "prior":
        grown = replace(grown, carried=replace(grown.carried, learnt=True))
    return end_step(plan, grown, model, state.free, grown.heldout_grown, None)


_STEER_UP, _STEER_DOWN, _STEER_RANGE = 1.25, 0.9, 4.0


def _steer(config: Config, weight: float, outcome: Outcome) -> float:
    """Return the next lambda: up while the devices lose what the prior knew, else down.

    Used where the server has no images of its own to distil on; it steers by the share of the
    held-out images that the prior gets right and the grown model still does.
    """
    if config.distils or not config.adaptive or not outcome.prior_right:
        return weight
    kept = outcome.both_right / outcome.prior_right
    weight *= _STEER_UP if kept < config.retention else _STEER_DOWN
    low, high = config.kd_weight / _STEER_RANGE, config.kd_weight * _STEER_RANGE
    return min(max(weight, low), high)


def after_weigh(plan: Plan, state: RunState, outcome: Outcome) -> RunState:
    """Refuse a grown model that is worse, or choose what to free."""
    config = plan.config
    prior, grown = outcome.prior_right / outcome.heldout, outcome.right / outcome.heldout
    if state.step > 0 and is_worse(outcome, config.accept_drop):
        return end_step(
            plan,
            replace(state, heldout_prior=prior, heldout_grown=grown),
            model=state.prior,
            free=state.free,
            consolidated=prior,
            refusal=(
                f"grown model {grown:.4f} is worse than the prior {prior:.4f} on the devices' "
                "held-out images: the prior stands"
            ),
        )
    model = current_model(plan, state)
    write_state(plan.net, model)
    scores = combine_ranks([bn_scale(plan.net, plan.graph), *outcome.scores])
    if config.choice == "random":
        scores = random_scores(plan.graph, numpy_rng("choice", config.seed, state.step))
    weighed = replace(
        state,
        phase="consolidate",
        round=0,
        class_counts=outcome.class_counts,
        base=model,
        values=None,
        source=None,
        heldout_prior=prior,
        heldout_grown=grown,
        kd_weight=config.kd_weight,
        scores=scores,
    )
    return _choose(plan, weighed)


def _choose(plan: Plan, state: RunState) -> RunState:
    """Pick the set to free: smaller than one that was refused; if none is left, end the step."""
    config, scores, among = plan.config, state.scores, None
    assert scores is not None
    if config.free_from == "last" and not state.free.empty:
        among = state.free
        scores = {
            name: score + 2.0 * ~np.isin(np.arange(len(score)), among.channels.get(name, ()))
            for name, score in scores.items()
        }  # ranks are at most 1: those of other filters come last

    def pick(share: float) -> FreeSet:
        chosen = choose(plan.graph, scores, share, cap=config.cap)
        return chosen if among is None else common_part(chosen, among)

    share, free = state.share, FreeSet({})
    if state.attempt == 0:
        free = pick(share)
    else:
        share, free = smaller(pick, share, config.shrink, state.next_free)
    state = replace(state, share=share)
    if free.empty or state.attempt >= plan.config.attempts:
        return end_step(plan, state, state.base, FreeSet({}), state.heldout_grown, None)
    return replace(state, next_free=free)


def after_consolidate(plan: Plan, state: RunState, outcome: Outcome) -> RunState:
    """Go on freeing, or judge it."""
    done = state.round + 1
    more: Phase = "consolidate" if done < plan.config.consolidate_rounds else "judge"
    return replace(
        state, phase=more, round=done if more == "consolidate" else 0, values=outcome.values
    )


def after_judge(plan: Plan, state: RunState, outcome: Outcome) -> RunState:
    """Accept what was freed, or try fewer filters."""
    # Both accuracies come from the same devices and images, so that a change of devices
    # between rounds cannot pass for a loss.
    drop = (outcome.prior_right - outcome.right) / outcome.heldout
    allowed = tolerated(outcome, plan.config.max_drop, plan.config.drop_errors) / outcome.heldout
    tried = Attempt(state.next_free.share(plan.graph), drop, drop <= allowed)
    judged = replace(state, attempts=(*state.attempts, tried))
    again = replace(
        judged,
        phase="consolidate",
        attempt=state.attempt + 1,
        round=0,
        values=None,
    )
    if not tried.accepted and not (opinionated(plan, state) and drop - allowed <= _WITHIN_REACH):
        return _choose(plan, again)
    right, model = outcome.right / outcome.heldout, current_model(plan, state)
    ended = end_step(plan, judged, model, state.next_free, right, None)
    if tried.accepted:
        return ended
    retry = _choose(plan, again)
    return replace(ended, retry=retry, allowed=allowed) if ended.phase == "tally" else retry


_WITHIN_REACH = 0.03
"""What a second opinion may give back of a model's accuracy; it gives about a point."""


def score_slices(graph: FilterGraph) -> Mapping[str, slice]:
    """Return where each layer's scores stand in one packed array of scores."""
    edges = np.cumsum([0, *(layer.width for layer in graph.layers)])
    return {
        layer.name: slice(int(a), int(b))
        for layer, a, b in zip(graph.layers, edges[:-1], edges[1:], strict=True)
    }
