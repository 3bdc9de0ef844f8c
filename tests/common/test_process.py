"""A process that trains: one thread, and memory that is kept for the next step."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from common.process import keep_freed_memory, settle

_RESIDENT = """
import resource, sys
import torch
from common.process import settle
if sys.argv[1] == "settled":
    settle()
def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()
def step():
    block = torch.ones(2**24)  # 64 MiB: by default glibc never keeps a block above 32 MiB
    return resident()
before = resident()
during = [step() for _ in range(3)][-1]
print(during - before, resident() - before)
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
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="no /proc/self/statm here")
def test_freed_memory_is_not_given_back_between_steps() -> None:
    # What a process holds, not how often it faults: some kernels of virtual machines count none.
    def memory(how: str) -> tuple[int, int]:
        command = [sys.executable, "-c", _RESIDENT, how]
        plain = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=plain)
        during, after = map(int, done.stdout.split())
        return during, after

    block = 64 * 2**20
    for how in ("settled", "plain"):
        during, after = memory(how)
        if during < 0.9 * block:
            pytest.skip("this kernel does not say how much memory a process holds")
        assert (after > 0.9 * block) == (how == "settled")
