"""Which answers are used: those to this very order, whose numbers are sound.

Each answer is checked when it comes, by itself and against what its device said before; all of a
round are then compared with one another, which needs no more of each than a few numbers.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from common.errors import UpdateError
from common.order import Order, Report
from common.update import check_values, decode_scores, decode_update, rows_of
from server.aggregate import pieces
from server.ledger import Ledger
from server.plan import Plan, RunState, layout_of, statistics_features, statistics_size
from server.plausible import check_class_sums, check_moments, check_report
from server.wire import Reply, group_of

_LEAST_COMPARED = 3
"""With two answers nobody can say which of them is out of the way."""
_REPORT_BYTES = 64 * 1024


@dataclass(frozen=True)
class Lengths:
    """How far an update went: its weights, and its BN statistics, in the Euclidean norm."""

    weights: float = 0.0
    statistics: float = 0.0


class Admission:
    """Checks and decodes the answers to one round's order.

    Parameters
    ----------
    plan, state, order
        Of the round.
    ledger : Ledger, optional
        What the devices said before.
    """

    def __init__(
        self, plan: Plan, state: RunState, order: Order, ledger: Ledger | None = None
    ) -> None:
        self.order = order
        self._config = plan.config
        self._ledger = ledger or Ledger()
        self._layout = layout_of(plan, state)
        self._rows = rows_of(self._layout)
        self._start = self._layout.pack(state.base) if state.values is None else state.values
        means, variances = self._layout.statistics
        self._statistics = np.concatenate([means, variances])
        self._scored = 2 * plan.graph.count
        gathered = order.phase in ("look", "tally", "anchor")
        self._sums = statistics_size(plan, state) if gathered else 0
        looked = order.phase in ("look", "tally")
        self._features = statistics_features(plan, state) if looked else 0

    @property
    def most_bytes(self) -> int:
        """Size above which an answer cannot be right."""
        phase, coded = self.order.phase, self.order.codec_up != "fp32"
        if phase in ("look", "tally", "advise", "anchor", "judge"):
            raw = 4 * self._sums
        elif phase == "weigh":
            raw = 4 * self._scored
        elif coded:
            raw = 2 * len(self._rows.edges) + 3 * self._layout.size
        else:
            raw = 4 * self._layout.size
        # deflate adds five bytes a block to what it cannot pack
        return _REPORT_BYTES + 32 * self.order.net.classes + raw + raw // 100 + 4096

    def admit(self, reply: Reply, device: str) -> Lengths:
        """Refuse an answer to another order, and one whose update is not sound.

        Returns
        -------
        Lengths
            For `outliers`.

        Raises
        ------
        UpdateError
            Saying why.
        """
        report = reply.report
        check_report(report, self.order, device)
        jump = self._ledger.jump(device, report.step, report.images, report.heldout)
        if jump is not None:
            raise UpdateError(jump)
        if self.order.phase in ("judge", "advise"):
            if reply.update is not None:
                raise UpdateError("an update in the reply to an order that asked for none")
            return Lengths()
        self._refuse_replay(self.mark(reply), device)
        return self._lengths(self.decoded(reply.update, report), report)

    def _refuse_replay(self, mark: str, device: str) -> None:
        """Refuse the update of another round; a round that is played again brings its own again."""
        now, _, digest = mark.partition(" ")
        then, _, last = self._ledger.of(device).last.partition(" ")
        if digest and digest == last and now != then:
            raise UpdateError(f"the update is that of round {then} again, to the byte")

    def mark(self, reply: Reply) -> str:
        """Return the round and what tells its update from others; empty if nothing does.

        The encoded difference of another round has other rounding, so that equal bytes are a
        replay. Plain values may well be equal.
        """
        training = self.order.phase in ("grow", "consolidate") and self.order.codec_up != "fp32"
        if not training or reply.update is None or not self._layout.size:
            return ""
        digest = hashlib.sha256(reply.update.tobytes()).hexdigest()[:16]
        return f"{group_of(self.order, 0)} {digest}"

    def decoded(self, update: np.ndarray | None, report: Report) -> np.ndarray:
        """Return what an answer's array holds: float32 values, importances or statistics.

        Replies are kept as they came, so that a round's memory is that of a few of them.

        Raises
        ------
        UpdateError
            If it is malformed.
        """
        order = self.order
        if update is None:
            raise UpdateError("no update in the reply")
        if order.phase in ("look", "tally"):
            sums = check_values(update, self._sums, "the statistics")
            if order.phase == "look" and not order.by_class:
                check_moments(sums, self._features, report)
            else:
                check_class_sums(sums, order.net.classes, self._features, report)
            return sums
        if order.phase in ("weigh", "anchor"):
            size = self._scored if order.phase == "weigh" else self._sums
            coded = order.codec_up != "fp32"
            scores = decode_scores(update, size) if coded else update
            check_values(scores, size, "the update")
            if scores.min(initial=0.0) < 0:
                raise UpdateError(f"the importances have a negative one: {scores.min()}")
            return scores
        values = decode_update(update, order.codec_up, self._start, self._layout, self._rows)
        least = float(values[self._layout.statistics[1]].min(initial=0.0))
        if least < 0:
            raise UpdateError(f"the update has a BN variance of {least}")
        return values

    def _lengths(self, values: np.ndarray, report: Report) -> Lengths:
        if self.order.phase in ("look", "tally"):
            return Lengths(float(np.linalg.norm(values.astype(np.float64))) / report.images)
        if self.order.phase in ("weigh", "anchor"):  # of gradients, which may well differ by much
            return Lengths()
        weights, where = 0.0, self._statistics
        statistics = values[where].astype(np.float64) - self._start[where]
        with np.errstate(over="ignore"):  # infinite is too long, too
            for piece in pieces(len(values)):
                moved = values[piece] - self._start[piece]
                moved[where[(where >= piece.start) & (where < piece.stop)] - piece.start] = 0
                weights += float(moved @ moved)
        return Lengths(math.sqrt(weights), float(np.linalg.norm(statistics)))

    def outliers(
        self, lengths: Mapping[str, Lengths], reports: Mapping[str, Report]
    ) -> dict[str, str]:
        """Return whose answers are out of all proportion to the round's, and why.

        Who has more images takes more steps, and goes further: an update is too long only if it
        is so for its images too, as noisy steps add up (by their root).
        """
        if len(lengths) < _LEAST_COMPARED:
            return {}
        config = self._config
        images = {name: float(report.images) for name, report in reports.items()}
        heldout = {name: float(report.heldout) for name, report in reports.items()}
        weights = {name: length.weights for name, length in lengths.items()}
        statistics = {name: length.statistics for name, length in lengths.items()}
        steps = {name: math.sqrt(count) for name, count in images.items()}
        once = dict.fromkeys(images, 1.0)
        found: dict[str, str] = {}
        for what, limit, values, allowed in (
            ("images", config.count_limit, images, once),
            ("heldout", config.count_limit, heldout, once),
            ("the update's length", config.norm_limit, weights, steps),
            ("the length of its BN statistics", config.norm_limit, statistics, steps),
        ):
            median = float(np.median(list(values.values())))
            scaled = {name: value / allowed[name] for name, value in values.items()}
            usual = float(np.median(list(scaled.values())))
            if not limit or not median:
                continue
            for name, value in values.items():
                if value > limit * median and scaled[name] > limit * usual:
                    found.setdefault(
                        name, f"{what} is above {limit:g} times the round's median {median:.3g}"
                    )
        return found
