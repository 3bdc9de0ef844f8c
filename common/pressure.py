"""How much memory this process may still take."""

from __future__ import annotations

import math
import resource
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")
_PROC = Path("/proc")


def memory_left() -> float:
    """Return the bytes left, as far as system, control group and process limit tell; else inf."""
    return min(_of_system(), _of_group(), _of_process())


def _of_system() -> float:
    for line in _lines(_PROC / "meminfo"):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return math.inf


def _of_group() -> float:
    limit, used = (_lines(_CGROUP / f"memory.{name}") for name in ("max", "current"))
    if not limit or not used or not limit[0].isdigit():
        return math.inf
    return int(limit[0]) - int(used[0])


def _of_process() -> float:
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit == resource.RLIM_INFINITY:
        return math.inf
    pages = int(_lines(_PROC / "self/statm")[0].split()[0])
    return limit - pages * resource.getpagesize()


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
