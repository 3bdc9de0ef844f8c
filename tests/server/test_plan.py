"""The plan of a run: phases follow one another, and nothing but the outcomes decides."""

from __future__ import annotations

import builtins
import itertools
import math
import os
import random
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from fake_grid import freed_prior, make_plan

from common.filters import FreeSet, cut, freed_index
from common.layout import consolidation_layout, scope_layout
from common.order import Order, as_channels, read_order
from common.regrow import regrow
from common.sparsify import scale_and_shift
from common.state import State, state_digest, write_state
from server.plan import (
    Outcome,
    Plan,
    RunState,
    advance,
    anneal_span,
    current_model,
    layout_of,
    order_of,
    rounds_left,
    score_slices,
    start,
)

HELDOUT = 1000


def outcome(plan: Plan, state: RunState, right: int = 700, prior_right: int = 700) -> Outcome:
    """What devices that learn a little would come to."""
    values, scores = None, ()
    if state.phase in ("grow", "consolidate"):
        layout = layout_of(plan, state)
        values = layout.pack(current_model(plan, state)) + np.float32(0.01)
    elif state.phase == "judge":
        values = state.values
    else:
        rng = np.random.default_rng(state.step)
        scores = tuple(
            {name: rng.random(s.stop - s.start) for name, s in score_slices(plan.graph).items()}
            for _ in range(2)
        )
    return Outcome(values, HELDOUT, right, prior_right, min(right, prior_right), scores)


def walk(
    plan: Plan,
    state: RunState,
    result: Callable[[Plan, RunState], Outcome] = outcome,
    until: Callable[[RunState], bool] = lambda state: False,
) -> list[RunState]:
    """Every state from `state` to the end, or to the first for which `until` holds."""
    states = [state]
    while not states[-1].done and not until(states[-1]):
        states.append(advance(plan, states[-1], result(plan, states[-1])))
    return states


def at(phase: str, step: int = 1) -> Callable[[RunState], bool]:
    return lambda state: state.phase == phase and state.step == step


def begin(plan: Plan) -> RunState:
    return start(plan, *freed_prior(plan))


def fingerprint(state: RunState) -> dict[str, Any]:
    """All of a state as plain data that compares by value."""
    plain: dict[str, Any] = {}
    for field in fields(state):
        value = getattr(state, field.name)
        if field.name in ("prior", "base"):
            value = state_digest(value)
        elif field.name in ("values", "tail"):
            value = None if value is None else value.tobytes()
        elif field.name == "scores" and value is not None:
            value = {name: score.tobytes() for name, score in value.items()}
        plain[field.name] = repr(value)
    return plain


def bytes_of(result: Outcome) -> bytes | None:
    return None if result.values is None else result.values.tobytes()


def same_bytes(one: State, other: State) -> bool:
    return state_digest(one) == state_digest(other)


@pytest.fixture(scope="module")
def plan() -> Plan:
    return make_plan(steps=2, rounds=3, consolidate_rounds=2, attempts=3, max_drop=0.01)


# the order of things


def test_a_step_grows_weighs_consolidates_and_is_judged(plan: Plan) -> None:
    states = walk(plan, begin(plan))
    step = ["grow"] * 3 + ["weigh"] + ["consolidate"] * 2 + ["judge"]
    assert [(s.step, s.phase) for s in states[:-1]] == [(n, p) for n in (1, 2) for p in step]
    assert [s.round for s in states[:7]] == [0, 1, 2, 0, 0, 1, 0]
    assert states[-1].done
    assert [o.step for o in states[-1].finished] == [1, 2]


def test_the_rounds_left_are_known_at_every_round(plan: Plan) -> None:
    for states in (
        walk(plan, begin(plan)),
        walk(plan, start(plan, freed_prior(plan, share=0.0)[0], FreeSet({}))),
    ):
        assert [rounds_left(plan, s) for s in states] == list(reversed(range(len(states))))


def test_a_finished_step_tells_what_it_came_to(plan: Plan) -> None:
    def result(plan: Plan, state: RunState) -> Outcome:
        right = {"judge": 795, "weigh": 800}.get(state.phase, 750)
        return outcome(plan, state, right, 800 if state.phase == "judge" else 700)

    first, second = walk(plan, begin(plan), result)[-1].finished
    assert (first.prior, first.grown, first.consolidated) == (0.7, 0.8, 0.795)
    assert first.refusal is None
    assert first.requested_share == plan.config.share
    (attempt,) = first.attempts
    assert attempt.accepted
    assert attempt.drop == pytest.approx(0.005)
    assert attempt.share == first.free.share(plan.graph)
    assert len(first.lambdas) == len(second.lambdas) == 3
    assert len(second.attempts) == 1  # of its own, not of the step before


def test_the_same_input_gives_the_same_state_and_stays_as_it_was(plan: Plan) -> None:
    for state in walk(plan, begin(plan)):
        if state.done:
            break
        result = outcome(plan, state)
        before = fingerprint(state)
        values = bytes_of(result)
        once, twice = advance(plan, state, result), advance(plan, state, result)
        assert fingerprint(once) == fingerprint(twice)
        assert fingerprint(state) == before
        assert bytes_of(result) == values
        assert order_of(plan, state) == order_of(plan, state)


def test_nothing_is_read_written_or_drawn(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the plan did I/O")

    def generators() -> list[str]:
        return [
            str(torch.get_rng_state().tolist()),
            str(np.random.get_state()),
            str(random.getstate()),
        ]

    begun, before = begin(plan), generators()
    monkeypatch.setattr(builtins, "open", refuse)
    monkeypatch.setattr(os, "open", refuse)
    for state in walk(plan, begun):
        if not state.done:
            order_of(plan, state)
    assert generators() == before


# growing


def test_growing_begins_with_exactly_the_prior_model(plan: Plan) -> None:
    state = begin(plan)
    x = torch.rand(16, 1, 8, 8)
    logits = []
    for model in (state.prior, current_model(plan, state)):
        write_state(plan.net, model)
        logits.append(plan.net.eval()(x))
    assert torch.allclose(*logits, atol=1e-6)
    assert not same_bytes(state.prior, state.base)


def test_every_step_draws_its_filters_anew(plan: Plan) -> None:
    prior, free = freed_prior(plan)
    drawn = {start(plan, prior, free).base_digest}
    other_run = make_plan(seed=1)
    drawn.add(start(other_run, prior, free).base_digest)
    bad = walk(
        plan, start(plan, prior, free), lambda p, s: outcome(p, s, right=0), until=at("grow", 2)
    )[-1]
    assert same_bytes(bad.prior, prior)
    drawn.add(bad.base_digest)
    assert len(drawn) == 3


def test_a_grown_model_worse_than_the_prior_is_refused_and_the_prior_stands(plan: Plan) -> None:
    begun = begin(plan)

    def worse(plan: Plan, state: RunState) -> Outcome:
        return outcome(plan, state, 690, 700)

    after = walk(plan, begun, worse, until=at("grow", 2))[-1]
    (refused,) = after.finished
    assert refused.refusal is not None
    assert "0.6900" in refused.refusal
    assert "0.7000" in refused.refusal
    assert refused.attempts == ()
    assert same_bytes(after.prior, begun.prior)
    assert after.free == begun.free == refused.free
    assert after.values is None
    assert refused.consolidated == refused.prior == 0.7


def test_a_last_step_that_is_refused_ends_the_run_with_the_prior() -> None:
    plan = make_plan(steps=1, rounds=1)
    begun = begin(plan)
    last = walk(plan, begun, lambda p, s: outcome(p, s, 1, 20))[-1]
    assert last.done
    assert same_bytes(last.prior, begun.prior)
    assert same_bytes(current_model(plan, replace(last, base=last.prior)), begun.prior)


@pytest.mark.parametrize(
    ("lost", "won", "refused"), [(50, 43, False), (60, 43, True), (0, 9, False)]
)
def test_a_difference_within_one_standard_error_is_no_reason_to_refuse(
    lost: int, won: int, refused: bool
) -> None:
    plan = make_plan(steps=1, rounds=1)

    def noisy(plan: Plan, state: RunState) -> Outcome:
        both = 700 - lost
        return replace(outcome(plan, state, both + won, 700), both_right=both)

    last = walk(plan, begin(plan), noisy)[-1]
    assert (last.finished[0].refusal is not None) == refused


def test_accept_drop_lets_a_slightly_worse_model_pass() -> None:
    plan = make_plan(steps=1, rounds=1, accept_drop=0.01)
    for right, phase in ((691, "consolidate"), (685, "weigh")):
        states = walk(plan, begin(plan), lambda p, s, r=right: outcome(p, s, r))  # type: ignore[misc]
        assert phase in [s.phase for s in states]
        assert (states[-1].finished[0].refusal is None) == (phase == "consolidate")


def test_lambda_rises_while_the_devices_forget_and_falls_while_they_do_not() -> None:
    plan = make_plan(steps=1, rounds=12, kd_weight=0.3, retention=0.9)

    def keeping(kept: int) -> list[float]:
        def result(plan: Plan, state: RunState) -> Outcome:
            return replace(outcome(plan, state), prior_right=1000, both_right=kept)

        states = walk(plan, begin(plan), result, until=at("weigh"))
        assert states[-1].lambdas == tuple(s.kd_weight for s in states[:-1])
        assert [order_of(plan, s).teaching.weight for s in states] == [s.kd_weight for s in states]
        return [s.kd_weight for s in states]

    forgetful, faithful = keeping(899), keeping(900)
    assert forgetful[1] > forgetful[0] == 0.3
    assert faithful[1] < faithful[0] == 0.3
    assert max(forgetful) == forgetful[-1] == pytest.approx(1.2)
    assert min(faithful) == faithful[-1] >= 0.075
    assert forgetful == sorted(forgetful)
    assert faithful == sorted(faithful, reverse=True)


def test_lambda_stands_still_where_the_server_distils_or_nothing_is_known() -> None:
    for plan, prior_right in ((make_plan(rounds=4, proxy="images"), 500), (make_plan(rounds=4), 0)):

        def result(plan: Plan, state: RunState, known: int = prior_right) -> Outcome:
            return replace(outcome(plan, state), prior_right=known, both_right=0)

        states = walk(plan, begin(plan), result, until=at("weigh"))
        assert {s.kd_weight for s in states} == {0.3}


def test_lambda_begins_every_consolidation_and_every_step_at_its_setting(plan: Plan) -> None:
    def forgetful(plan: Plan, state: RunState) -> Outcome:
        return replace(outcome(plan, state), both_right=0)

    for state in walk(plan, begin(plan), forgetful):
        if state.phase in ("consolidate", "judge") or (state.phase == "grow" and not state.round):
            assert state.kd_weight == plan.config.kd_weight


# consolidating


def test_the_next_free_set_is_the_least_important_share_of_the_whole_net(plan: Plan) -> None:
    state = walk(plan, begin(plan), until=at("consolidate"))[-1]
    widths = {layer.name: layer.width for layer in plan.graph.layers}
    assert state.next_free.channels.keys() == widths.keys()
    assert state.next_free != state.free
    assert state.scores is not None
    for name, freed in state.next_free.channels.items():
        kept = sorted(set(range(widths[name])) - set(freed))
        assert state.scores[name][list(freed)].max() <= state.scores[name][kept].min()


def test_the_scales_fall_to_exactly_zero_and_nothing_jumps_between_rounds() -> None:
    for anneal, rounds in ((0.6, 5), (1.0, 3), (1.0, 7), (0.05, 1), (0.34, 10)):
        plan = make_plan(steps=1, rounds=1, consolidate_rounds=rounds, anneal=anneal)
        states = walk(plan, begin(plan), until=lambda s: s.phase == "judge")
        states = [s for s in states if s.phase in ("consolidate", "judge")]
        spans = [anneal_span(plan, s) for s in states[:-1]]
        assert [order_of(plan, s).anneal for s in states[:-1]] == [(*s, anneal) for s in spans]
        assert spans[0][0] == 0.0
        assert spans[-1][1] == 1.0
        assert [a for a, _ in spans[1:]] == [b for _, b in spans[:-1]]
        freed = freed_index(plan.graph, states[0].next_free).own
        names = scale_and_shift(plan.graph) & freed.keys()
        assert names
        for state in states:
            progress = 1.0 if state.phase == "judge" else anneal_span(plan, state)[0]
            factor = max(0.0, 1 - progress / anneal)
            model = current_model(plan, state)
            for name in names:
                expected = state.base[name][freed[name]] * factor
                assert torch.equal(model[name][freed[name]], expected)
        assert all(not current_model(plan, states[-1])[n][freed[n]].any() for n in names)


def test_what_a_step_ends_with_computes_the_same_without_its_free_filters(plan: Plan) -> None:
    state = walk(plan, begin(plan), until=at("grow", 2))[-1]
    write_state(plan.net, state.prior)
    net = plan.net.eval()
    x = torch.rand(8, 1, 8, 8)
    with torch.no_grad():
        assert torch.allclose(net(x), cut(net, plan.graph, state.free)(x), atol=1e-5)


@pytest.mark.parametrize(("errors", "most"), [(0.0, 10), (1.0, 13), (2.0, 18)])
def test_what_freeing_may_cost_is_known_to_some_standard_errors(errors: float, most: int) -> None:
    # 13 lost and none won have a standard error of 3.6, 18 one of 4.2
    plan = make_plan(
        steps=1, rounds=1, consolidate_rounds=1, max_drop=0.01, drop_errors=errors, attempts=1
    )
    for lost in (most, most + 1):

        def costly(plan: Plan, state: RunState, lost: int = lost) -> Outcome:
            return outcome(plan, state, 700 - lost if state.phase == "judge" else 700)

        (tried,) = walk(plan, begin(plan), costly)[-1].finished[0].attempts
        assert tried.accepted == (lost == most)


def test_a_freeing_that_costs_too_much_is_tried_again_with_a_smaller_share() -> None:
    plan = make_plan(
        steps=2, rounds=3, consolidate_rounds=2, attempts=3, max_drop=0.01, drop_errors=0.0
    )

    def costly(plan: Plan, state: RunState) -> Outcome:
        lost = 11 if state.phase == "judge" and state.attempt == 0 else 10
        return outcome(plan, state, 700 - lost if state.phase == "judge" else 700, 700)

    states = walk(plan, begin(plan), costly, until=at("grow", 2))
    tries = [s for s in states if s.phase == "consolidate" and s.round == 0]
    assert [s.attempt for s in tries] == [0, 1]
    assert tries[1].share == pytest.approx(0.3 * plan.config.shrink)
    assert tries[1].next_free.count < tries[0].next_free.count
    assert tries[1].values is None
    assert tries[1].base_digest == tries[0].base_digest
    (done,) = states[-1].finished
    assert [a.accepted for a in done.attempts] == [False, True]
    assert [a.drop for a in done.attempts] == pytest.approx([0.011, 0.01])
    assert states[-1].free == tries[1].next_free
    assert states[-1].share == plan.config.share  # the next step asks for the whole share again


def test_after_the_last_try_nothing_is_freed_and_the_grown_model_stays_whole(plan: Plan) -> None:
    def hopeless(plan: Plan, state: RunState) -> Outcome:
        return outcome(plan, state, 0 if state.phase == "judge" else 700)

    states = walk(plan, begin(plan), hopeless, until=at("grow", 2))
    judged = [s for s in states if s.phase == "judge"]
    after = states[-1]
    (done,) = after.finished
    assert len(done.attempts) == len(judged) == plan.config.attempts
    assert not any(a.accepted for a in done.attempts)
    assert after.free.empty
    assert done.free.empty
    assert done.refusal is None
    assert same_bytes(after.prior, judged[0].base)
    assert same_bytes(after.base, after.prior)
    assert after.attempt == 0
    rest = walk(plan, after)  # and the run goes on
    assert rest[-1].done
    assert not rest[-1].free.empty


def test_with_nothing_free_a_run_of_rows_ends_early_and_says_why() -> None:
    plan = make_plan(steps=2, rounds=1, consolidate_rounds=1, attempts=1, scope="rows")

    def hopeless(plan: Plan, state: RunState) -> Outcome:
        return outcome(plan, state, 0 if state.phase == "judge" else 700)

    last = walk(plan, begin(plan), hopeless)[-1]
    assert last.done
    assert [outcome.step for outcome in last.finished] == [1]
    assert last.stopped is not None
    assert "max-drop 0.005" in last.stopped


@pytest.mark.parametrize(("average", "averaged"), [(1, [5]), (3, [3, 4, 5]), (9, [1, 2, 3, 4, 5])])
def test_growing_ends_with_the_mean_of_its_last_rounds(average: int, averaged: list[int]) -> None:
    plan = make_plan(rounds=5, average=average)

    def numbered(plan: Plan, state: RunState) -> Outcome:
        values = np.full(layout_of(plan, state).size, state.round + 1, np.float32)
        return replace(outcome(plan, state), values=values)

    states = walk(plan, begin(plan), numbered, until=at("weigh"))
    assert [s.values[0] for s in states[1:-1] if s.values is not None] == [1, 2, 3, 4]
    last = states[-1].values
    assert last is not None
    assert last.dtype == np.float32
    assert np.allclose(last, np.mean(averaged))
    assert states[-1].tail is None


# a model that was brought


def test_a_brought_prior_is_first_freed_on_the_devices(plan: Plan) -> None:
    whole, _ = freed_prior(plan, share=0.0)
    state = start(plan, whole, FreeSet({}))
    states = walk(plan, state)
    assert [(s.step, s.phase) for s in states[:5]] == [
        (0, "weigh"),
        (0, "consolidate"),
        (0, "consolidate"),
        (0, "judge"),
        (1, "grow"),
    ]
    order = order_of(plan, state)
    assert order.base == order.keep == state_digest(whole)
    assert order.regrown is None
    assert order_of(plan, states[1]).kept == {}
    assert not states[4].free.empty
    assert [o.step for o in states[-1].finished] == [0, 1, 2]


def test_a_brought_prior_is_never_worse_than_itself(plan: Plan) -> None:
    whole, _ = freed_prior(plan, share=0.0)
    state = start(plan, whole, FreeSet({}))
    after = advance(plan, state, outcome(plan, state, 600, 700))
    assert after.phase == "consolidate"


# orders


def orders(plan: Plan) -> list[tuple[RunState, Order]]:
    return [(s, order_of(plan, s)) for s in walk(plan, begin(plan)) if not s.done]


def test_every_order_names_what_it_belongs_to(plan: Plan) -> None:
    for state, order in orders(plan):
        assert order.graph == plan.graph.digest
        assert order.base == state_digest(state.base)
        assert (order.run, order.step, order.phase) == (plan.config.seed, state.step, state.phase)
        assert (order.round, order.attempt) == (state.round, state.attempt)
        if order.phase in ("grow", "weigh"):
            layout = scope_layout(order.scope, plan.graph, order.free_set(), state.base)
            assert order.free_set() == state.free
        else:
            layout = consolidation_layout(plan.graph, order.free_set(), state.base)
            assert order.free_set() == state.next_free
            assert order.kept == as_channels(state.free)
        assert order.layout == layout.digest
        assert read_order(order.model_dump_json()) == order


def test_a_device_that_holds_the_prior_can_make_the_base_itself(plan: Plan) -> None:
    priors: dict[str, State] = {}
    seen = 0
    for state, order in orders(plan):
        priors[state_digest(state.prior)] = state.prior
        if order.phase in ("grow", "weigh"):
            assert order.regrown is not None
            made = regrow(
                priors[order.regrown.source],
                plan.graph,
                FreeSet({k: tuple(v) for k, v in order.regrown.free.items()}),
                seed=order.regrown.seed,
                diversity=order.regrown.rules(),
            )
            assert state_digest(made) == order.base
            seen += 1
        else:
            assert order.regrown is None
    assert seen == 8


def test_what_is_measured_is_kept_by_the_device_as_the_next_base(plan: Plan) -> None:
    steps = orders(plan)
    for (state, order), (_, following) in itertools.pairwise(steps):
        if order.phase == "weigh":
            assert order.keep == following.base
        elif order.phase == "judge":
            assert following.regrown is not None
            assert order.keep == following.regrown.source
        else:
            assert order.keep is None
        if order.keep is not None:
            assert order.keep == state_digest(current_model(plan, state))


def test_only_training_orders_have_a_learning_rate_and_it_falls(plan: Plan) -> None:
    config = plan.config
    rates: dict[tuple[int, str], list[float]] = {}
    for _, order in orders(plan):
        rates.setdefault((order.step, order.phase), []).append(order.lr)
    for (_, phase), lr in rates.items():
        if phase in ("weigh", "judge"):
            assert set(lr) == {0.0}
        else:
            assert lr[0] == (config.lr if phase == "grow" else config.consolidate_lr)
            assert lr == sorted(lr, reverse=True)
            assert min(lr) > 0
    assert rates[1, "grow"] == rates[2, "grow"]


def test_grey_images_are_never_flipped_and_cropped_by_an_eighth(plan: Plan) -> None:
    order = order_of(plan, begin(plan))
    assert not order.flip
    assert order.crop == 1
    assert order_of(make_plan(crop=0), begin(plan)).crop == 0


def test_scores_are_packed_layer_by_layer(plan: Plan) -> None:
    slices = score_slices(plan.graph)
    assert list(slices) == [layer.name for layer in plan.graph.layers]
    covered = np.concatenate([np.arange(s.start, s.stop) for s in slices.values()])
    assert covered.tolist() == list(range(plan.graph.count))
    assert math.prod(covered.shape) == sum(layer.width for layer in plan.graph.layers)
