"""Where worker processes come from: one process that has imported what a device needs.

It is started first, and imports while the server does; every worker is a fork of it, so that
torch is imported once and its memory shared. A fork of the server's own process would not be sound.
"""

from __future__ import annotations

from multiprocessing.context import ForkServerContext

from common.forks import fork_server


def prepare() -> ForkServerContext:
    """Start that process, if it does not run yet, and return the context that forks it."""
    return fork_server(["server.preloaded"])
