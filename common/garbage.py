"""When Python looks for unreachable cycles: not while it imports, nor as it ends.

Importing torch and Flower makes a million objects that stay. By default every 700 new ones begin a
search among the newest, and many of these one among all: a sixth of the time of importing. When
the interpreter ends it searches all of them again, for another third of a second.
"""

from __future__ import annotations

import functools
import gc
import sys
from typing import NoReturn

_USUAL = gc.get_threshold()
_WHILE_IMPORTING = 200_000


def hasten_imports() -> None:
    """Search seldom from now on, until `settle_imports`; before anything large is imported."""
    gc.set_threshold(_WHILE_IMPORTING, *_USUAL[1:])


@functools.cache  # what is garbage then is never found: once in a process
def settle_imports() -> None:
    """Search as often as usual from now on, but never again what is there already."""
    gc.freeze()
    gc.set_threshold(*_USUAL)


def end_process(code: int) -> NoReturn:
    """End this process with an exit code, as `sys.exit` does, without a last search."""
    gc.freeze()
    sys.exit(code)
