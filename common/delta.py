"""What devices and server mean by an epsilon of differential privacy."""

from __future__ import annotations

DELTA = 1e-5
"""Every epsilon is stated at this delta: the chance that what it promises does not hold."""
