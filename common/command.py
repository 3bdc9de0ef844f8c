"""How both command lines end: one line for an error, and its exit code."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from types import FrameType

from common.errors import FallowError

INTERRUPTED = 130
_GO_ON = "interrupted: go on with --resume"


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def run_command(command: Callable[[], None], go_on: str = _GO_ON) -> int:
    """Run a command line and return its exit code; an error is told in one line.

    Parameters
    ----------
    command : callable
        What to run.
    go_on : str
        What is told after an interruption.
    """
    signal.signal(signal.SIGTERM, _interrupt)  # so that a service manager's stop loses nothing
    try:
        command()
    except FallowError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(go_on, file=sys.stderr)
        return INTERRUPTED
    except SystemExit as end:
        if end.code == INTERRUPTED:  # Typer takes Ctrl-C itself, and says nothing
            print(go_on, file=sys.stderr)
        return int(end.code or 0)
    return 0
