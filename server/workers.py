"""Where worker processes come from: one process that has imported what a device needs.

It is started first, and imports while the server does; every worker is a fork of it, so that
torch is imported once and its memory shared. It runs no thread and no training, so that a fork
of it is sound, which one of the server's process would not be.
"""

from __future__ import annotations

import multiprocessing
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext

_NEEDED = ["client.app", "common.tracing", "server.cli"]
"""The last is what a worker finds as its main module when `fallow` is called."""


def prepare() -> ForkServerContext:
    """Start that process, if it does not run yet, and return the context that forks it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_NEEDED)
    forkserver.ensure_running()
    return context
