"""Every random draw comes from a generator named by what it is for.

``seed_of("train", run, step, round, device)`` is a 63-bit number that depends on its
arguments alone, so that the same run draws the same numbers on every engine and after
every restart, and no two purposes share a stream.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


def seed_of(purpose: str, *key: int | str) -> int:
    """Return a seed in [0, 2**63) for one purpose and key.

    Parameters
    ----------
    purpose : str
        What is drawn, for example ``"train"`` or ``"sample"``.
    *key : int or str
        Whatever tells this draw from others: run seed, step, round, device.
    """
    return int(digest_of(purpose, *key)[:16], 16) >> 1


def digest_of(*key: int | str) -> str:
    """Return the SHA-256 (hex) of whatever tells this key from others."""
    text = "\x1f".join(str(part) for part in key)
    return hashlib.sha256(text.encode()).hexdigest()


def numpy_rng(purpose: str, *key: int | str) -> np.random.Generator:
    """Return a NumPy generator for one purpose and key (see `seed_of`)."""
    return np.random.default_rng(seed_of(purpose, *key))


def torch_rng(purpose: str, *key: int | str) -> torch.Generator:
    """Return a CPU torch generator for one purpose and key (see `seed_of`)."""
    import torch  # late: a device that only collects needs none

    generator = torch.Generator()
    generator.manual_seed(seed_of(purpose, *key))
    return generator
