"""A process that trains: one thread, and memory that is kept for the next step."""

from __future__ import annotations

import os
import resource
import subprocess
import sys

import pytest
import torch

from common.process import keep_freed_memory, settle

_FAULTS = """
import resource, sys
import torch
from common.process import settle
if sys.argv[1] == "settled":
    settle()
def step():
    blocks = [torch.ones(2**20) for _ in range(8)]  # 4 MiB each
for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_threads_are_set() -> None:
    before = torch.get_num_threads()
    try:
        settle(2)
        assert torch.get_num_threads() == 2
        settle()
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(not keep_freed_memory(), reason="this C library is not glibc")
def test_freed_memory_is_not_given_back_between_steps() -> None:
    def faults(how: str) -> int:
        command = [sys.executable, "-c", _FAULTS, how]
        plain = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=plain)
        return int(done.stdout)

    settled = faults("settled")
    assert settled < 8 * 4 * 2**20 // resource.getpagesize() / 8  # of one step's pages
    assert faults("plain") > 4 * settled
