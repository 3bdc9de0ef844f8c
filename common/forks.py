"""Processes that are forked from one which has imported what they need (Python's fork server).

It runs no thread and no training, so that a fork of it is sound, and its memory is shared.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext


def fork_server(modules: Sequence[str]) -> ForkServerContext:
    """Start the process that imports `modules`, if none runs yet; return the context of its forks.

    It imports while this process goes on; the first fork waits for it.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(modules))
    forkserver.ensure_running()
    return context
