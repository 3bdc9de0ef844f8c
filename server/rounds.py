"""The loop over Flower's grid: select, ask, collect, check, aggregate, go on or repeat.

A round is one of Bonawitz et al., "Towards Federated Learning at Scale", MLSys 2019: devices are
selected, some more than are wanted (``over-selection``); they are told what to do; and they report
until as many have answered as are wanted, or time is up. With fewer than ``quorum`` of those, the
round is abandoned and repeated after a pause, and that ``repeats`` times at most. Nothing waits
for ever.

Whatever the order in which the answers come, they are averaged in the order of the devices' names.
With over-selection, who is among them hangs on who is first.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
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
from server.quarantine import Quarantine
from server.robust import robust_mean, robust_scores
from server.shared import share
from server.synthetic import ImageMaker
from server.taken import Taken, Updates
from server.wire import NodeError, Reply, group_of, order_message, read_reply


class Distiller(Protocol):
    """Distils a round's mean at the server, where the operator has images."""

    def __call__(
        self, plan: Plan, state: RunState, mean: np.ndarray, updates: Updates
    ) -> np.ndarray:
        """Return the distilled packed values."""


class Watcher(Protocol):
    """Is told how a round goes."""

    def device_done(self, done: int, asked: int) -> None:
        """So many of the asked devices have answered."""

    def message(self, text: str) -> None:
        """Something that people should see."""

    def device(self, name: str, event: str, reason: str | None = None) -> None:
        """Hear what became of one device in a round.

        `event` is ``used``, ``declined``, ``refused``, ``failed``, ``silent``, ``late`` or
        ``rests``.
        """

    def abandoned(self, reason: str) -> None:
        """Hear that a try at a round came to nothing."""


@dataclass
class Tally:
    """What went over the wire in a round and who was left out, by reason.

    Attributes
    ----------
    asked, wanted : int
        Devices; with `wanted` answers the round closes.
    refused : list of dict
        Device and reason of every update that was not admitted.
    late : int
        Replies that came when their round was over.
    rests : int
        Devices that were not asked because they failed too often.
    epsilon : float or None
        The largest that a device reported; None where none noises what it sends.
    """

    asked: int
    wanted: int
    down: int = 0
    up: int = 0
    declined: Counter[str] = field(default_factory=Counter)
    refused: list[dict[str, str]] = field(default_factory=list)
    late: int = 0
    rests: int = 0
    epsilon: float | None = None


@dataclass(frozen=True)
class Keep:
    """Where a run keeps what does not belong in memory.

    Attributes
    ----------
    spool : Path, optional
        Folder of a round's updates while it lasts; by default the system's for such files.
    quarantine : Quarantine, optional
        Of refused updates.
    """

    spool: Path | None = None
    quarantine: Quarantine | None = None


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
    keep: Keep | None = None,
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
    keep : Keep, optional
        Where what does not belong in memory is kept.

    Raises
    ------
    RoundError
        If too few devices were there or answered a round, `repeats` times in a row.
    """
    table = _Table(grid, plan, fleet, watcher, distiller, keep or Keep())
    while not state.done:
        state, seconds = maker(plan, state)
        outcome, record = table.valid_round(state)
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


@dataclass(frozen=True, eq=False)
class _Table:
    """What all rounds of a run share."""

    grid: Grid
    plan: Plan
    fleet: Fleet
    watcher: Watcher
    distiller: Distiller | None
    keep: Keep

    def valid_round(self, state: RunState) -> tuple[Outcome, dict[str, Any]]:
        """Play one round, again if too few are there or answer."""
        config, where = self.plan.config, f"step {state.step} {state.phase} round {state.round + 1}"
        order = order_of(self.plan, state)
        admission = Admission(self.plan, state, order, self.fleet.ledger)
        so_far = Tally(0, 0)  # what abandoned tries sent, refused and waited for counts too
        for attempt in range(config.repeats):
            try:
                self._gather()
            except RoundError as error:
                reason, short = str(error), f"too few devices: {error}"
            else:
                began = time.monotonic()
                with Taken(admission, self.keep.spool) as taken:
                    tally = self._exchange(state, admission, taken, attempt)
                    _add(so_far, tally)
                    needed = max(1, math.ceil(config.quorum * tally.wanted - 1e-9))
                    if len(taken) >= needed:
                        outcome, loss = self._aggregate(state, taken)
                        self._note_used(state, taken)
                        seconds = time.monotonic() - began
                        record = _record(
                            self.plan, state, outcome, tally, len(taken), loss, seconds
                        )
                        return outcome, {**record, "tries": attempt + 1}
                    reason = (
                        f"{len(taken)} of {tally.asked} devices answered, {needed} needed "
                        f"({_reasons(tally)})"
                    )
                    short = (
                        f"fewer than {needed} of {tally.asked} devices answered, "
                        f"{config.repeats} times ({_reasons(tally)})"
                    )
            self.watcher.abandoned(reason)
            self.watcher.message(
                f"round abandoned: {reason}; try {attempt + 1} of {config.repeats}"
            )
            if attempt + 1 < config.repeats:
                time.sleep(_PAUSE_SECONDS)
        raise RoundError(f"{where}: {short}. All rounds before it are kept: continue with --resume")

    def _gather(self) -> None:
        """Wait for the devices without which no round begins."""
        config = self.plan.config
        wanted = config.min_devices or config.devices
        self.fleet.wait_for(wanted, config.node_timeout, self.watcher.message)

    def _exchange(self, state: RunState, admission: Admission, taken: Taken, attempt: int) -> Tally:
        """Send this round's order and take the valid replies."""
        config, order, fleet = self.plan.config, admission.order, self.fleet
        downlink = Downlink(self.plan.graph, state, order, fleet)
        share_asked = config.sample if order.phase in ("grow", "consolidate") else 1.0
        key = (config.seed, order.step, order.phase, order.attempt, order.round)
        least = config.quorum
        asked = fleet.sample(share_asked, *key, over=config.over_selection, least=least)
        names = {node: name for name, node in asked.items()}
        wanted = math.floor(len(asked) / config.over_selection + 1e-9)
        tally = Tally(len(asked), wanted, rests=len(fleet.present()) - len(fleet.awake(least)))
        resent: set[int] = set()
        most = admission.most_bytes
        group = group_of(order, attempt)

        def message(node: int, arrays: dict[str, np.ndarray]) -> Message:
            made, size = order_message(node, order, arrays, attempt)
            tally.down += size
            return made

        def resend(node: int, reply: Message) -> Message | None:
            what = None if node in resent or reply.has_error() else _lacking(reply, most)
            if what is None:
                return None
            resent.add(node)
            tally.up += read_reply(reply).size
            return message(node, downlink.missing(names[node], what))

        tally.late = self._drop_late()
        first = [message(node, downlink.arrays(name)) for name, node in asked.items()]
        answered: set[str] = set()
        closed = False
        replies = zip_replies(self.grid, first, config.round_timeout, resend, fleet.late)
        del first
        with closing(replies):
            for node, raw in replies:
                name = names[node]
                answered.add(name)
                self.watcher.device_done(len(answered), len(asked))
                self._take(name, raw, admission, taken, tally, group)
                if name in taken:
                    downlink.note(name)
                closed = len(taken) >= wanted
                if closed and len(answered) < len(asked):
                    break
        for name, (reason, update) in taken.refuse_outliers().items():
            self._refuse(name, reason, update, order, tally)
        self._note_silent([name for name in asked if name not in answered], tally, closed)
        for name in taken.reports:
            fleet.ledger.answered(name)
        spent = [r.epsilon for r in taken.reports.values() if r.epsilon is not None]
        tally.epsilon = max(spent, default=None)
        fleet.ledger.exchanges += 1
        return tally

    def _take(
        self,
        name: str,
        raw: Message,
        admission: Admission,
        taken: Taken,
        tally: Tally,
        group: str,
    ) -> None:
        """Take one reply, or count why not."""
        reply: Reply | None = None
        try:
            reply = read_reply(raw, admission.most_bytes, group)
            tally.up += reply.size
            if reply.report.declined is not None:
                reason = _line(reply.report.declined)
                tally.declined[reason] += 1
                self.fleet.ledger.answered(name)
                self.watcher.device(name, "declined", reason)
                return
            taken.add(name, reply)
        except NodeError as error:
            tally.declined[str(error)] += 1
            self.watcher.device(name, "failed", str(error))
            self._failed(name)
        except UpdateError as error:
            update = None if reply is None else reply.update
            self._refuse(name, _line(str(error)), update, admission.order, tally)

    def _refuse(
        self, name: str, reason: str, update: np.ndarray | None, order: Any, tally: Tally
    ) -> None:
        tally.declined[reason] += 1
        tally.refused.append({"device": name, "reason": reason})
        self.watcher.device(name, "refused", reason)
        if self.keep.quarantine is not None:
            where = {k: getattr(order, k) for k in ("step", "phase", "attempt", "round")}
            self.keep.quarantine.put(where, name, reason, update)
        self._failed(name)

    def _note_silent(self, silent: list[str], tally: Tally, closed: bool) -> None:
        """Count those who have not answered when the round closed, or time was up."""
        if not silent:
            return
        if closed:
            tally.declined[_NOT_NEEDED] += len(silent)  # no fault of theirs
            return
        tally.declined["no answer in time"] += len(silent)
        for name in silent:
            self.watcher.device(name, "silent")
            self._failed(name)

    def _failed(self, name: str) -> None:
        config = self.plan.config
        if self.fleet.ledger.failed(name, config.rest_after, config.rest_rounds):
            self.watcher.device(name, "rests")
            self.watcher.message(
                f"{name} failed {config.rest_after} times in a row and rests for "
                f"{config.rest_rounds} rounds"
            )

    def _drop_late(self) -> int:
        """Drop the replies that came after their round was over; return how many."""
        nodes = self.fleet.sweep()
        names = {node: name for name, node in self.fleet.present().items()}
        for node in nodes:
            self.watcher.device(names.get(node, f"node {node}"), "late")
        return len(nodes)

    def _note_used(self, state: RunState, taken: Taken) -> None:
        for name, report in taken.reports.items():
            self.fleet.ledger.counted(name, state.step, report.images, report.heldout)
            self.fleet.ledger.of(name).last = taken.mark(name)
            self.watcher.device(name, "used")

    def _aggregate(self, state: RunState, taken: Taken) -> tuple[Outcome, float]:
        """Return what the replies come to, and the mean training loss."""
        plan, reports = self.plan, list(taken.reports.values())
        images = sum(report.images for report in reports)
        heldout = sum(report.heldout for report in reports)
        if not heldout:
            raise RoundError(
                f"the devices hold out no image: raise heldout (now {plan.config.heldout}) or "
                "give them more images"
            )
        outcome = Outcome(
            values=None,
            heldout=heldout,
            right=sum(report.right for report in reports),
            prior_right=sum(report.prior_right for report in reports),
            both_right=sum(report.both_right for report in reports),
            rival_right=sum(report.rival_right for report in reports),
            peer_right=tuple(
                sum(counts) for counts in zip(*(r.peer_right for r in reports), strict=True)
            ),
            class_counts=tuple(
                sum(counts) for counts in zip(*(r.class_counts for r in reports), strict=True)
            ),
        )
        if state.phase in ("look", "tally"):
            sums = sum(update.astype(np.float64) for update in taken)
            return replace(outcome, sums=np.asarray(sums)), math.nan
        if state.phase == "anchor":
            shares = (r.images / images * update for r, update in zip(reports, taken, strict=True))
            return replace(outcome, sums=np.asarray(sum(shares), np.float64)), math.nan
        if state.phase == "weigh":
            return replace(outcome, scores=_scores(plan, taken)), math.nan
        if state.phase in ("judge", "advise"):
            return replace(outcome, values=state.values), math.nan
        layout = layout_of(plan, state)
        values = self._mean(state, taken)
        if self.distiller is not None and state.phase == "grow" and state.way == "whole":
            values = self.distiller(plan, state, values, taken)
        if state.shared is not None:
            values = move(values, state.shared.residue, layout)
        loss = sum(report.loss * report.images for report in reports) / images
        return replace(outcome, values=values), loss

    def _mean(self, state: RunState, taken: Taken) -> np.ndarray:
        config, layout = self.plan.config, layout_of(self.plan, state)
        counts = [report.images for report in taken.reports.values()]
        if config.mean != "weighted":
            return robust_mean(
                config.mean, taken, counts, layout, config.faulty_share, self.keep.spool
            )
        mean = MaskedMean(layout)
        for update, images in zip(taken, counts, strict=True):
            mean.add(update, images)
        return mean.result()


def _lacking(message: Message, most: int) -> str | None:
    """Return what a device says it lacks."""
    try:
        declined = read_reply(message, most).report.declined
    except UpdateError:
        return None
    return declined if declined in (NEEDS_BASE, NEEDS_VALUES) else None


def _scores(plan: Plan, taken: Taken) -> tuple[Scores, ...]:
    """Return the devices' mean sensitivities and Taylor scores, by layer."""
    if plan.config.mean != "weighted":
        total = robust_scores(taken)
    else:
        total = np.zeros(2 * sum(layer.width for layer in plan.graph.layers))
        for update, report in zip(taken, taken.reports.values(), strict=True):
            total += report.images * update.astype(np.float64)
    slices = score_slices(plan.graph)
    return tuple(
        {name: part[where] for name, where in slices.items()} for part in np.split(total, 2)
    )


def _reasons(tally: Tally) -> str:
    if not tally.declined:
        return "no answer in time"
    return "; ".join(f"{n}x {why}" for why, n in tally.declined.most_common(3))


def _line(text: str) -> str:
    """Return what a device says as one line of bounded length."""
    return " ".join(text.split())[:_LONGEST_REASON] or "no reason given"


_LONGEST_REASON = 300
_NOT_NEEDED = "not waited for: enough had answered"


def _add(so_far: Tally, tally: Tally) -> None:
    """Add a try's traffic and refusals to those before it, and the sums to the try."""
    for name in ("down", "up", "late"):
        setattr(so_far, name, getattr(so_far, name) + getattr(tally, name))
        setattr(tally, name, getattr(so_far, name))
    so_far.refused = tally.refused = so_far.refused + tally.refused


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
        "devices_wanted": tally.wanted,
        "refused": tally.refused,
        "late": tally.late,
        "resting": tally.rests,
        "epsilon": tally.epsilon,
    }
