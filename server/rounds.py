"""The loop over Flower's grid: ask, collect, check, aggregate, go on or repeat."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
from flwr.app import Message
from flwr.serverapp import Grid

from common.errors import RoundError, UpdateError
from common.layout import Layout, dense_layout
from common.order import NEEDS_BASE, Order
from common.update import check_values
from server.aggregate import MaskedMean
from server.fleet import Fleet, zip_replies
from server.plan import (
    Outcome,
    Plan,
    RunState,
    Scores,
    advance,
    anneal_span,
    layout_of,
    order_of,
    score_slices,
)
from server.wire import Reply, order_message, read_reply


class Distiller(Protocol):
    """Distils a round's mean at the server, where the operator has images."""

    def __call__(
        self, plan: Plan, state: RunState, mean: np.ndarray, updates: list[np.ndarray]
    ) -> np.ndarray:
        """Return the distilled packed values."""


class Watcher(Protocol):
    """Is told how a round goes."""

    def device_done(self, done: int, asked: int) -> None:
        """So many of the asked devices have answered."""

    def message(self, text: str) -> None:
        """Something that people should see."""


@dataclass
class Tally:
    """What went over the wire in a round and who was left out, by reason."""

    asked: int
    down: int = 0
    up: int = 0
    declined: Counter[str] = field(default_factory=Counter)


def play_rounds(
    grid: Grid,
    plan: Plan,
    state: RunState,
    fleet: Fleet,
    watcher: Watcher,
    after_round: Callable[[RunState, RunState, dict[str, Any]], None],
    distiller: Distiller | None = None,
) -> RunState:
    """Play rounds until the plan is done.

    Parameters
    ----------
    grid, fleet
        Flower's grid or ours, and the devices on it.
    plan, state
        What to do and where it stands.
    after_round : callable
        Called with the state before and after a round and the round's record; it writes the
        checkpoint, so what it has returned from is never lost.
    distiller : Distiller, optional
        Of the server's own images.

    Raises
    ------
    RoundError
        If too few devices answered a round, `repeats` times in a row.
    """
    while not state.done:
        outcome, record = _valid_round(grid, plan, state, fleet, watcher, distiller)
        before, state = state, advance(plan, state, outcome)
        after_round(before, state, record)
    return state


_PAUSE_SECONDS = 2.0


def _valid_round(
    grid: Grid,
    plan: Plan,
    state: RunState,
    fleet: Fleet,
    watcher: Watcher,
    distiller: Distiller | None,
) -> tuple[Outcome, dict[str, Any]]:
    """Play one round, again if too few answer."""
    config = plan.config
    wanted = config.min_devices or config.devices
    down = up = 0  # what abandoned tries sent counts too
    for attempt in range(config.repeats):
        fleet.wait_for(wanted, config.node_timeout)
        began = time.monotonic()
        replies, tally = _exchange(grid, plan, state, fleet, watcher)
        down, up = down + tally.down, up + tally.up
        tally.down, tally.up = down, up
        needed = max(1, math.ceil(config.quorum * tally.asked - 1e-9))
        if len(replies) >= needed:
            outcome, loss = _aggregate(plan, state, replies, distiller)
            seconds = time.monotonic() - began
            return outcome, _record(plan, state, outcome, tally, len(replies), loss, seconds)
        watcher.message(
            f"round abandoned: {len(replies)} of {tally.asked} devices answered, {needed} "
            f"needed ({_reasons(tally)}); try {attempt + 1} of {config.repeats}"
        )
        if attempt + 1 < config.repeats:
            time.sleep(_PAUSE_SECONDS)
    raise RoundError(
        f"step {state.step} {state.phase} round {state.round + 1}: fewer than {needed} of "
        f"{tally.asked} devices answered, {config.repeats} times ({_reasons(tally)}). All "
        "rounds before it are kept: continue with --resume"
    )


def _reasons(tally: Tally) -> str:
    if not tally.declined:
        return "no answer in time"
    return "; ".join(f"{n}x {why}" for why, n in tally.declined.most_common(3))


def _exchange(
    grid: Grid, plan: Plan, state: RunState, fleet: Fleet, watcher: Watcher
) -> tuple[dict[str, Reply], Tally]:
    """Send this round's order and collect the valid replies, by device name."""
    config = plan.config
    order = order_of(plan, state)
    layout = layout_of(plan, state)
    scored = 2 * sum(layer.width for layer in plan.graph.layers)
    share = config.sample if order.phase in ("grow", "consolidate") else 1.0
    asked = fleet.sample(share, config.seed, order.step, order.phase, order.attempt, order.round)
    names = {node: name for name, node in asked.items()}
    tally = Tally(len(asked))
    whole = dense_layout(plan.graph, state.base).pack(state.base)
    given: set[int] = set()

    def message(node: int, with_base: bool) -> Message:
        arrays = {} if state.values is None else {"values": state.values}
        if with_base:
            arrays["base"] = whole
            given.add(node)
        made, size = order_message(node, order, arrays)
        tally.down += size
        return made

    def resend(node: int, reply: Message) -> Message | None:
        if node in given or reply.has_error() or not _needs_base(reply):
            return None
        fleet.forget(names[node], order.base)
        return message(node, with_base=True)

    first = [
        message(node, with_base=not _can_make_base(fleet, name, order))
        for name, node in asked.items()
    ]
    replies: dict[str, Reply] = {}
    done = 0
    for node, raw in zip_replies(grid, first, config.round_timeout, resend):
        done += 1
        watcher.device_done(done, len(asked))
        try:
            reply = read_reply(raw)
            tally.up += reply.size
            if reply.report.declined is not None:
                raise UpdateError(reply.report.declined)
            size = {"weigh": scored, "judge": 0}.get(order.phase, layout.size)
            _admit(reply, order, size, names[node])
            if order.phase in ("grow", "consolidate"):
                _check_variances(reply, layout)
        except UpdateError as error:
            tally.declined[str(error)] += 1
            continue
        replies[names[node]] = reply
        fleet.note(names[node], order.base, order.keep)
    if done < len(asked):
        tally.declined["no answer in time"] += len(asked) - done
    return dict(sorted(replies.items())), tally


def _needs_base(message: Message) -> bool:
    try:
        return read_reply(message).report.declined == NEEDS_BASE
    except UpdateError:
        return False


def _can_make_base(fleet: Fleet, device: str, order: Order) -> bool:
    source = order.regrown.source if order.regrown is not None else order.base
    return fleet.holds(device, order.base) or fleet.holds(device, source)


def _admit(reply: Reply, order: Order, size: int, device: str) -> None:
    """Refuse a reply that answers another order or whose update is not sound."""
    report = reply.report
    for name in ("run", "step", "phase", "attempt", "round", "base", "free_digest", "layout"):
        if getattr(report, name) != getattr(order, name):
            raise UpdateError(
                f"{name} is {getattr(report, name)}, asked was {getattr(order, name)}"
            )
    if report.device != device:
        raise UpdateError(f"device '{report.device}' answered for '{device}'")
    # One answer with these would end the run or decide it.
    counts = (
        report.both_right,
        min(report.right, report.prior_right),
        max(report.right, report.prior_right),
        report.heldout,
    )
    if list(counts) != sorted(counts):
        raise UpdateError(
            f"right {report.right}, prior_right {report.prior_right} and both_right "
            f"{report.both_right} do not fit {report.heldout} held-out images"
        )
    if not (1 <= report.images <= 2**53 and math.isfinite(report.loss)):
        raise UpdateError(f"images {report.images} with loss {report.loss} are no counts to use")
    if (len(report.class_counts), sum(report.class_counts)) != (order.net.classes, report.images):
        raise UpdateError(
            f"class_counts {str(report.class_counts)[:80]} are not {report.images} images of "
            f"{order.net.classes} classes"
        )
    if size and reply.update is None:
        raise UpdateError("no update in the reply")
    if reply.update is not None:
        check_values(reply.update, size, "the update")


def _check_variances(reply: Reply, layout: Layout) -> None:
    assert reply.update is not None
    least = float(reply.update[layout.statistics[1]].min(initial=0.0))
    if least < 0:
        raise UpdateError(f"the update has a BN variance of {least}")


def _aggregate(
    plan: Plan, state: RunState, replies: dict[str, Reply], distiller: Distiller | None
) -> tuple[Outcome, float]:
    """Return what the replies come to, and the mean training loss."""
    reports = [reply.report for reply in replies.values()]
    images = sum(report.images for report in reports)
    heldout = sum(report.heldout for report in reports)
    if not heldout:
        raise RoundError(
            f"the devices hold out no image: raise heldout (now {plan.config.heldout}) or give "
            "them more images"
        )
    outcome = Outcome(
        values=None,
        heldout=heldout,
        right=sum(report.right for report in reports),
        prior_right=sum(report.prior_right for report in reports),
        both_right=sum(report.both_right for report in reports),
        class_counts=tuple(
            sum(counts) for counts in zip(*(r.class_counts for r in reports), strict=True)
        ),
    )
    if state.phase == "weigh":
        return replace(outcome, scores=_scores(plan, replies)), math.nan
    if state.phase == "judge":
        return replace(outcome, values=state.values), math.nan
    mean = MaskedMean(layout_of(plan, state))
    updates = []
    for reply in replies.values():
        assert reply.update is not None
        mean.add(reply.update, reply.report.images)
        updates.append(reply.update)
    values = mean.result()
    if distiller is not None and state.phase == "grow":
        values = distiller(plan, state, values, updates)
    loss = sum(report.loss * report.images for report in reports) / images
    return replace(outcome, values=values), loss


def _scores(plan: Plan, replies: dict[str, Reply]) -> tuple[Scores, ...]:
    """Return the devices' mean sensitivities and Taylor scores, by layer."""
    total = np.zeros(2 * sum(layer.width for layer in plan.graph.layers))
    for reply in replies.values():
        assert reply.update is not None
        total += reply.report.images * reply.update.astype(np.float64)
    slices = score_slices(plan.graph)
    return tuple(
        {name: part[where] for name, where in slices.items()} for part in np.split(total, 2)
    )


def _record(
    plan: Plan,
    state: RunState,
    outcome: Outcome,
    tally: Tally,
    used: int,
    loss: float,
    seconds: float,
) -> dict[str, Any]:
    """Return one line of rounds.jsonl."""
    consolidating = state.phase == "consolidate"
    scale = max(0.0, 1 - anneal_span(plan, state)[0] / plan.config.anneal)
    return {
        "step": state.step,
        "phase": state.phase,
        "attempt": state.attempt,
        "round": state.round + 1,
        "devices_asked": tally.asked,
        "devices_used": used,
        "declined": dict(tally.declined),
        "heldout_accuracy": outcome.right / outcome.heldout,
        "train_loss": None if math.isnan(loss) else loss,
        "agreement": outcome.both_right / outcome.prior_right if outcome.prior_right else None,
        "lambda": state.kd_weight,
        "bytes_up": tally.up,
        "bytes_down": tally.down,
        "seconds": seconds,
        "scope": plan.config.scope if state.phase == "grow" else "all",
        "scale": scale if consolidating else None,
    }
