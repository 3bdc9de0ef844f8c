"""Noise on what leaves the device, and what it is worth.

The update of a round is scaled to an L2 norm of at most `clip`, and Gaussian noise with a standard
deviation of `noise` x `clip` is added to each of its values, before it is encoded (the Gaussian
mechanism; per device, as in local differential privacy). Whatever is done to it afterwards,
encoding and error feedback included, discloses nothing more.

The accountant says what all noised updates together disclose of one device's images, at most:
epsilon at `DELTA`, against the same updates without any image behind them. It does not cover counts
of images and right answers, losses and filter importances, which go without noise; statistics of
images (phases ``look`` and ``tally``) are refused while noise is on.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from client.index import Index
from common.delta import DELTA
from common.errors import ConfigError
from common.seeds import numpy_rng

if TYPE_CHECKING:
    from common.order import Order


@dataclass(frozen=True)
class Privacy:
    """How an update is noised.

    Attributes
    ----------
    clip : float
        Largest L2 norm of the difference that travels.
    noise : float
        Standard deviation of the noise, in multiples of `clip`; 0 = clipped only.
    secret : str
        Of the device. Noise that others can draw again is none, so it does not come from the
        run's seed.
    """

    clip: float
    noise: float
    secret: str

    def __post_init__(self) -> None:
        if self.clip <= 0:
            raise ConfigError(
                f"noise is {self.noise:g} but nothing is clipped: set dp-clip (or privacy.clip)"
            )

    def apply(self, moved: np.ndarray) -> np.ndarray:
        """Return a clipped and noised copy of `moved`, float32 [n].

        The same difference gets the same noise, so that a round that is repeated discloses
        nothing new.
        """
        exact = moved.astype(np.float64)
        norm = float(np.linalg.norm(exact))
        exact *= min(1.0, self.clip / norm) if norm else 1.0
        if self.noise:
            content = hashlib.sha256(np.ascontiguousarray(moved).tobytes()).hexdigest()
            rng = numpy_rng("privacy", self.secret, content)
            exact += rng.normal(0.0, self.noise * self.clip, len(exact))
        return exact.astype(np.float32)


def chosen(
    run_clip: float, run_noise: float, own_clip: float, own_noise: float, secret: str
) -> Privacy | None:
    """Return what run and device ask for, the stricter of each; None if neither does."""
    clips = [clip for clip in (run_clip, own_clip) if clip]
    noise = max(run_noise, own_noise)
    if not clips and not noise:
        return None
    return Privacy(min(clips, default=0.0), noise, secret)


def note_release(index: Index, order: Order, update: np.ndarray, noise: float) -> None:
    """Enter a noised update into the device's ledger, before it is sent."""
    key = hashlib.sha256(order.base.encode() + update.tobytes()).hexdigest()
    with index.writing():
        index.run("INSERT OR IGNORE INTO releases VALUES (?, ?, ?)", (key, noise, time.time()))


def released(index: Index) -> list[float]:
    """Return the noise of every update that has left the device under noise."""
    return [float(noise) for (noise,) in index.run("SELECT noise FROM releases")]


def epsilon_of(noises: Sequence[float], delta: float = DELTA) -> float:
    """Return epsilon at `delta` of updates noised so, together (Mironov 2017).

    Infinite if one went without noise; 0 for none.
    """
    if not noises:
        return 0.0
    if min(noises) <= 0:
        return float("inf")
    # Late: it takes seconds to import, and only devices that noise need it.
    from opacus.accountants.analysis import rdp

    orders = [1 + x / 10.0 for x in range(1, 100)] + [float(x) for x in range(11, 1024)]
    total = np.zeros(len(orders))
    for noise in set(noises):
        steps = list(noises).count(noise)
        total += np.asarray(
            rdp.compute_rdp(q=1.0, noise_multiplier=noise, steps=steps, orders=orders)
        )
    epsilon, _ = rdp.get_privacy_spent(orders=orders, rdp=total, delta=delta)
    return float(epsilon)
