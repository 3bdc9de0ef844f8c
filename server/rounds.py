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
from common.order import NEEDS_BASE, NEEDS_VALUES
from common.update import move
from server.admission import Admission
from server.aggregate import MaskedMean
from server.downlink import Downlink
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
    scope_of,
    score_slices,
)
from server.shared import share
from server.synthetic import ImageMaker
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


_MAKER = ImageMaker()


def play_rounds(
    grid: Grid,
    plan: Plan,
    state: RunState,
    fleet: Fleet,
    watcher: Watcher,
    after_round: Callable[[RunState, RunState, dict[str, Any]], None],
    distiller: Distiller | None = None,
    maker: ImageMaker = _MAKER,
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
    maker : ImageMaker
        Makes the server's synthetic images, if any setting asks for them.

    Raises
    ------
    RoundError
        If too few devices answered a round, `repeats` times in a row.
    """
    while not state.done:
        state, seconds = maker(plan, state)
        outcome, record = _valid_round(grid, plan, state, fleet, watcher, distiller)
        if seconds:
            record["synthesis_seconds"] = seconds
        before, state = state, _shared(plan, state, advance(plan, state, outcome))
        after_round(before, state, record)
    return state


def _shared(plan: Plan, before: RunState, after: RunState) -> RunState:
    """Return the state with the values that the devices will decode."""
    _, codec = plan.config.codecs(after.phase)
    if codec == "fp32" or after.values is None:
        return after if after.shared is None else replace(after, shared=None)
    layout = layout_of(plan, after)
    base, last = layout.pack(after.base), before.shared
    if last is not None and len(last.residue) != layout.size:
        last = None  # a wider scope, or one net where there were peers: nobody holds these yet
    values, shared = share(after.values, base, last, layout, codec)
    return replace(after, values=values, shared=shared)


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
    admission = Admission(plan, state, order_of(plan, state))
    down = up = 0  # what abandoned tries sent counts too
    for attempt in range(config.repeats):
        fleet.wait_for(wanted, config.node_timeout)
        began = time.monotonic()
        replies, tally = _exchange(grid, plan, state, admission, fleet, watcher)
        down, up = down + tally.down, up + tally.up
        tally.down, tally.up = down, up
        needed = max(1, math.ceil(config.quorum * tally.asked - 1e-9))
        if len(replies) >= needed:
            outcome, loss = _aggregate(plan, state, replies, admission, distiller)
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
    grid: Grid,
    plan: Plan,
    state: RunState,
    admission: Admission,
    fleet: Fleet,
    watcher: Watcher,
) -> tuple[dict[str, Reply], Tally]:
    """Send this round's order and collect the valid replies, by device name."""
    config, order = plan.config, admission.order
    downlink = Downlink(plan.graph, state, order, fleet)
    share = config.sample if order.phase in ("grow", "consolidate") else 1.0
    asked = fleet.sample(share, config.seed, order.step, order.phase, order.attempt, order.round)
    names = {node: name for name, node in asked.items()}
    tally = Tally(len(asked))
    resent: set[int] = set()

    def message(node: int, arrays: dict[str, np.ndarray]) -> Message:
        made, size = order_message(node, order, arrays)
        tally.down += size
        return made

    def resend(node: int, reply: Message) -> Message | None:
        what = None if node in resent or reply.has_error() else _lacking(reply)
        if what is None:
            return None
        resent.add(node)
        tally.up += read_reply(reply).size
        return message(node, downlink.missing(names[node], what))

    first = [message(node, downlink.arrays(name)) for name, node in asked.items()]
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
            admission.admit(reply, names[node])
        except UpdateError as error:
            tally.declined[str(error)] += 1
            continue
        replies[names[node]] = reply
        downlink.note(names[node])
    if done < len(asked):
        tally.declined["no answer in time"] += len(asked) - done
    return dict(sorted(replies.items())), tally


def _lacking(message: Message) -> str | None:
    """Return what a device says it lacks."""
    try:
        declined = read_reply(message).report.declined
    except UpdateError:
        return None
    return declined if declined in (NEEDS_BASE, NEEDS_VALUES) else None


def _aggregate(
    plan: Plan,
    state: RunState,
    replies: dict[str, Reply],
    admission: Admission,
    distiller: Distiller | None,
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
        peer_right=tuple(
            sum(counts) for counts in zip(*(r.peer_right for r in reports), strict=True)
        ),
        class_counts=tuple(
            sum(counts) for counts in zip(*(r.class_counts for r in reports), strict=True)
        ),
    )
    if state.phase in ("look", "tally"):
        sums = sum(admission.decoded(reply).astype(np.float64) for reply in replies.values())
        return replace(outcome, sums=np.asarray(sums)), math.nan
    if state.phase == "anchor":
        shares = (r.report.images / images * admission.decoded(r) for r in replies.values())
        return replace(outcome, sums=np.asarray(sum(shares), np.float64)), math.nan
    if state.phase == "weigh":
        return replace(outcome, scores=_scores(plan, replies, admission)), math.nan
    if state.phase == "judge":
        return replace(outcome, values=state.values), math.nan
    layout = layout_of(plan, state)
    mean = MaskedMean(layout)
    for reply in replies.values():
        mean.add(admission.decoded(reply), reply.report.images)
    values = mean.result()
    if distiller is not None and state.phase == "grow" and state.way == "whole":
        updates = [admission.decoded(reply) for reply in replies.values()]
        values = distiller(plan, state, values, updates)
    if state.shared is not None:
        values = move(values, state.shared.residue, layout)
    loss = sum(report.loss * report.images for report in reports) / images
    return replace(outcome, values=values), loss


def _scores(plan: Plan, replies: dict[str, Reply], admission: Admission) -> tuple[Scores, ...]:
    """Return the devices' mean sensitivities and Taylor scores, by layer."""
    total = np.zeros(2 * sum(layer.width for layer in plan.graph.layers))
    for reply in replies.values():
        total += reply.report.images * admission.decoded(reply).astype(np.float64)
    slices = score_slices(plan.graph)
    return tuple(
        {name: part[where] for name, where in slices.items()} for part in np.split(total, 2)
    )


def _scope(plan: Plan, state: RunState) -> str:
    if state.phase != "grow":
        return "all"
    return "expert" if state.way == "expert" else scope_of(plan, state)


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
        "scope": _scope(plan, state),
        "scale": scale if consolidating else None,
    }
