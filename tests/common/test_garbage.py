"""Python's search for cycles: seldom while importing, as usual afterwards, not at the end."""

from __future__ import annotations

import subprocess
import sys

_PROBE = """
import gc
usual = gc.get_threshold()
from common.garbage import end_process, hasten_imports, settle_imports
hasten_imports()
assert gc.get_threshold()[0] > 100 * usual[0], gc.get_threshold()
settle_imports()
there = gc.get_freeze_count()
assert there > 1000, there
assert gc.get_threshold() == usual, gc.get_threshold()
class Cycle:
    pass
for _ in range(2):
    cycle = Cycle()
    cycle.itself = cycle
    del cycle
    settle_imports()  # once in a process: what came later is found
assert gc.get_freeze_count() <= there
assert gc.collect() >= 2
left = [object() for _ in range(10)]
end_process(7)
"""


def test_collection_is_put_off_while_importing_and_ends_with_the_exit_code() -> None:
    done = subprocess.run([sys.executable, "-c", _PROBE], capture_output=True, text=True)
    assert done.returncode == 7, done.stderr


def test_workers_come_from_a_process_that_has_imported_and_settled() -> None:
    code = (
        "import gc, sys; usual = gc.get_threshold(); import server.preloaded\n"
        "assert gc.get_threshold() == usual and gc.get_freeze_count() > 10_000\n"
        "assert {'client.app', 'common.tracing', 'server.cli', 'torch'} <= set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
