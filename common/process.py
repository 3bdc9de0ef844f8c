"""How a process that trains is set up: threads, and what becomes of freed memory."""

from __future__ import annotations

import ctypes
import functools

import torch

from common.garbage import settle_imports

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_MOST = 2**30
"""Bytes; both thresholds are ints to mallopt(3)."""


def settle(threads: int = 1) -> None:
    """Prepare this process for training.

    Parameters
    ----------
    threads : int
        Of torch. Sums round alike wherever a device is trained if it is the same everywhere.
    """
    torch.set_num_threads(threads)
    keep_freed_memory()
    settle_imports()


@functools.cache
def keep_freed_memory() -> bool:
    """Let the C library keep what is freed for what is allocated next; tell whether it does.

    A training step allocates and frees the same activations and gradients again and again. By
    default glibc gives the large ones back to the kernel each time, and every page of them is
    cleared and mapped anew in the next step: 10,000 page faults a step, 7-20 % of the time of a
    small net. The peak of the memory is the same, but it is held until the process ends. Other C
    libraries are left as they are.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # musl, macOS, Windows
        return False
    return all(mallopt(name, _MOST) for name in (_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD))
