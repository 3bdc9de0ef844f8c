"""Which of a device's images only measure."""

from __future__ import annotations

from client.index import Image, Index
from common.data.holdout import below


def heldout_share(index: Index, least: float) -> float:
    """Return the share that is held out: the most that any run has asked for.

    What once measured is never trained on, so the share does not shrink.
    """
    return max(float(index.about("heldout") or 0.0), least)


def measures(image: Image, share: float) -> bool:
    """Return whether an image is held out, and its label is a person's."""
    labelled = image.origin in ("given", "corrected")
    return labelled and below(bytes.fromhex(image.digest), share)
