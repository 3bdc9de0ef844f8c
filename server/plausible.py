"""Whether what a device says of itself can be: its counts, its loss, its statistics."""

from __future__ import annotations

import math

import numpy as np

from common.errors import UpdateError
from common.features import ClassSums
from common.gate import Moments
from common.order import Order, Report

_LARGEST_LOSS = 1e6
_ROUNDING = 1e-3
"""Relative; sums travel in float32."""


def check_report(report: Report, order: Order, device: str) -> None:
    """Refuse a report on another order, and one whose numbers do not fit one another.

    Raises
    ------
    UpdateError
        Naming what is wrong.
    """
    for name in ("run", "step", "phase", "attempt", "round", "base", "free_digest", "layout"):
        if getattr(report, name) != getattr(order, name):
            said = str(getattr(report, name))[:80]
            raise UpdateError(f"{name} is {said}, asked was {getattr(order, name)}")
    if report.device != device:
        raise UpdateError(f"device '{report.device[:80]}' answered for '{device}'")
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
    if report.rival_right > (report.heldout if order.rival is not None else 0):
        raise UpdateError(
            f"rival_right {_short(report.rival_right)} does not fit {report.heldout} held-out "
            "images"
        )
    peers = order.peers if order.phase == "grow" else 1
    if len(report.peer_right) != (peers if peers > 1 else 0) or any(
        right > report.heldout for right in report.peer_right
    ):
        raise UpdateError(
            f"peer_right {str(report.peer_right)[:80]} does not fit {peers} peer(s) and "
            f"{report.heldout} held-out images"
        )
    if max(report.images, report.heldout) > 2**53 or report.images < 1:
        raise UpdateError(
            f"images {_short(report.images)} and heldout {_short(report.heldout)} are no counts "
            "to use"
        )
    if not (math.isfinite(report.loss) and abs(report.loss) <= _LARGEST_LOSS):
        raise UpdateError(f"the training loss is {report.loss}")
    if (len(report.class_counts), sum(report.class_counts)) != (order.net.classes, report.images):
        raise UpdateError(
            f"class_counts {str(report.class_counts)[:80]} are not {report.images} images of "
            f"{order.net.classes} classes"
        )


def _short(count: int) -> str:
    return str(count)[:24] if count.bit_length() < 10_000 else "beyond measure"


def check_moments(values: np.ndarray, size: int, report: Report) -> None:
    """Refuse statistics (see `common.gate.Moments`) that no images have.

    Raises
    ------
    UpdateError
        If they count other images than the report, or break Cauchy-Schwarz.
    """
    seen = Moments.unpack(values, size)
    if np.float32(seen.count) != np.float32(report.images):
        raise UpdateError(
            f"the statistics count {seen.count:.0f} images, the report {report.images}"
        )
    _check_sums(seen.total**2 / seen.count, np.diag(seen.second))


def check_class_sums(values: np.ndarray, classes: int, size: int, report: Report) -> None:
    """Refuse class statistics (see `common.features.ClassSums`) that no images have.

    Raises
    ------
    UpdateError
        If they count other images than the report, or break Cauchy-Schwarz.
    """
    seen = ClassSums.unpack(values, classes, size)
    if (seen.counts.astype(np.float32) != np.asarray(report.class_counts, np.float32)).any():
        raise UpdateError("the statistics count other images of a class than the report")
    some = seen.counts > 0
    if seen.sums[~some].any():
        raise UpdateError("the statistics have a sum for a class without images")
    _check_sums((seen.sums[some] ** 2 / seen.counts[some, None]).sum(0), np.diag(seen.second))


def _check_sums(least: np.ndarray, squares: np.ndarray) -> None:
    slack = _ROUNDING * (np.abs(squares) + np.abs(least)) + 1e-6
    wrong = np.flatnonzero(squares + slack < least)
    if len(wrong) or (squares < 0).any():
        raise UpdateError("the statistics have a feature with a negative variance")
