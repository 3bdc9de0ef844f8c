"""Which answers are used: those to this very order, whose numbers are sound."""

from __future__ import annotations

import math

import numpy as np

from common.errors import UpdateError
from common.order import Order, Report
from common.update import check_values, decode_scores, decode_update, rows_of
from server.plan import Plan, RunState, layout_of, statistics_size
from server.wire import Reply


class Admission:
    """Checks and decodes the answers to one round's order.

    Parameters
    ----------
    plan, state, order
        Of the round.
    """

    def __init__(self, plan: Plan, state: RunState, order: Order) -> None:
        self.order = order
        self._layout = layout_of(plan, state)
        self._rows = rows_of(self._layout)
        self._start = self._layout.pack(state.base) if state.values is None else state.values
        self._scored = 2 * plan.graph.count
        gathered = order.phase in ("look", "tally", "anchor")
        self._statistics = statistics_size(plan, state) if gathered else 0

    def admit(self, reply: Reply, device: str) -> None:
        """Refuse an answer to another order, and one whose update is not sound.

        Raises
        ------
        UpdateError
            Saying why.
        """
        _check_report(reply.report, self.order, device)
        if self.order.phase != "judge":
            self.decoded(reply)
        elif reply.update is not None:
            raise UpdateError("an update in the reply to an order that asked for none")

    def decoded(self, reply: Reply) -> np.ndarray:
        """Return what an answer's array holds: float32 values or importances.

        Replies are kept as they came, so that a round's memory is that of its messages.

        Raises
        ------
        UpdateError
            If it is malformed.
        """
        order, update = self.order, reply.update
        if update is None:
            raise UpdateError("no update in the reply")
        if order.phase in ("look", "tally"):
            return check_values(update, self._statistics, "the statistics")
        if order.phase in ("weigh", "anchor"):
            size = self._scored if order.phase == "weigh" else self._statistics
            coded = order.codec_up != "fp32"
            scores = decode_scores(update, size) if coded else update
            check_values(scores, size, "the update")
            if order.phase == "anchor" and float(scores.min(initial=0.0)) < 0:
                raise UpdateError(f"the update has an importance of {scores.min()}")
            return scores
        values = decode_update(update, order.codec_up, self._start, self._layout, self._rows)
        least = float(values[self._layout.statistics[1]].min(initial=0.0))
        if least < 0:
            raise UpdateError(f"the update has a BN variance of {least}")
        return values


def _check_report(report: Report, order: Order, device: str) -> None:
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
    peers = order.peers if order.phase == "grow" else 1
    if len(report.peer_right) != (peers if peers > 1 else 0) or any(
        right > report.heldout for right in report.peer_right
    ):
        raise UpdateError(
            f"peer_right {str(report.peer_right)[:80]} does not fit {peers} peer(s) and "
            f"{report.heldout} held-out images"
        )
    if not (1 <= report.images <= 2**53 and math.isfinite(report.loss)):
        raise UpdateError(f"images {report.images} with loss {report.loss} are no counts to use")
    if (len(report.class_counts), sum(report.class_counts)) != (order.net.classes, report.images):
        raise UpdateError(
            f"class_counts {str(report.class_counts)[:80]} are not {report.images} images of "
            f"{order.net.classes} classes"
        )
