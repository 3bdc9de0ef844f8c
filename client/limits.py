"""What a device gives to training: beyond it, it declines the round and says why.

A round that would take too long is declined at once, by the pace of rounds before it, and stopped
where the pace was wrong. Without a word, the server would wait for its time limit instead.
"""

from __future__ import annotations

import importlib
import json
import os
import shlex
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from client.index import Index
from client.power import why_metered, why_not_charging
from client.settings import Limits
from common.errors import ConfigError, FallowError

if TYPE_CHECKING:
    from common.order import Order

_MIB = 2**20
_CHECK_SECONDS = 30.0

FORGIVEN = 0.9
"""What a pace is multiplied by after a declined round: a device that was slow once is asked again
some rounds later."""


class LimitError(FallowError):
    """A round is beyond what the device gives to training."""


class Guard:
    """Watches over one round.

    Parameters
    ----------
    index : Index
        The store, which remembers the pace of earlier rounds.
    limits : Limits
        The device's.
    clock : callable
        Seconds; only differences count.
    """

    def __init__(
        self, index: Index, limits: Limits, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._index = index
        self._limits = limits
        self._clock = clock
        self._began = clock()
        self._order: Order | None = None
        self._images = 0

    def admit(self) -> None:
        """Raise LimitError if the device does not train just now."""
        limits = self._limits
        free = memory_free()
        if free is not None and free < limits.memory_mib * _MIB:
            raise LimitError(
                f"{free // _MIB} MiB of memory are free, this device trains from "
                f"{limits.memory_mib} MiB"
            )
        reasons = [
            why_not_charging() if limits.charging else None,
            why_metered() if limits.unmetered else None,
            own_check(limits.check) if limits.check else None,
        ]
        for reason in reasons:
            if reason:
                raise LimitError(reason)

    def expect(self, order: Order, images: int) -> None:
        """Raise LimitError if the round would take too long, as far as is known."""
        self._order, self._images = order, images
        pace = self._paces().get(_kind(order))
        if not self._limits.seconds or pace is None:
            return
        expected = pace * _work(order, images)
        if expected > self._limits.seconds:
            self._note(pace * FORGIVEN)
            raise LimitError(
                f"the round would take about {expected:.0f} s, this device gives "
                f"{self._limits.seconds:g} s"
            )

    def check(self, done: float) -> None:
        """Raise LimitError if the round, of which the share `done` is over, goes too far."""
        limits = self._limits
        passed = self._clock() - self._began
        if limits.seconds and passed > limits.seconds:
            if self._order is not None:
                # at least: the next such round is declined before it begins
                work = _work(self._order, self._images)
                self._note(passed / max(done, 0.01) / work)
            raise LimitError(
                f"stopped after {passed:.0f} s with {done:.0%} of the training done: this device "
                f"gives a round {limits.seconds:g} s"
            )
        used = memory_used()
        if limits.process_mib and used is not None and used > limits.process_mib * _MIB:
            raise LimitError(
                f"stopped: training takes {used // _MIB} MiB of memory, this device gives "
                f"{limits.process_mib} MiB"
            )

    def finished(self) -> None:
        """Remember the pace of a round that was carried out."""
        if self._order is not None:
            self._note((self._clock() - self._began) / _work(self._order, self._images))

    def _paces(self) -> dict[str, float]:
        return {k: float(v) for k, v in json.loads(self._index.about("paces") or "{}").items()}

    def _note(self, pace: float) -> None:
        assert self._order is not None
        with self._index.writing():
            paces = {**self._paces(), _kind(self._order): pace}
            self._index.set("paces", json.dumps(paces, sort_keys=True))


def _kind(order: Order) -> str:
    net = order.net
    shape = "x".join(str(n) for n in net.input_shape)
    return f"{net.name} {net.width:g} {shape} {order.phase} {order.scope}"


def _work(order: Order, images: int) -> int:
    """Return how many images a round passes through the net, up to a factor of its kind."""
    return max(images, 1) * max(order.epochs, 1)


def own_check(text: str) -> str | None:
    """Ask the owner's own check; return why not to train, or None.

    Parameters
    ----------
    text : str
        ``module:function``, which returns a reason or nothing; or a command, which says no by
        its exit code and why by its first line.

    Raises
    ------
    ConfigError
        If there is no such module, function or command.
    """
    module, colon, name = text.partition(":")
    if colon and module.replace(".", "").isidentifier() and name.isidentifier():
        try:
            reason = getattr(importlib.import_module(module), name)()
        except (ImportError, AttributeError) as error:
            raise ConfigError(f"limits.check is '{text}': {error}; correct it") from None
        return str(reason) if reason else None
    try:
        done = subprocess.run(
            shlex.split(text),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_CHECK_SECONDS,
            check=False,
        )
    except (OSError, ValueError) as error:
        raise ConfigError(f"limits.check is '{text}': {error}; correct it") from None
    except subprocess.TimeoutExpired:
        return f"limits.check gave no answer within {_CHECK_SECONDS:.0f} s"
    if done.returncode == 0:
        return None
    said = (done.stdout or done.stderr).strip().splitlines()
    return said[0][:200] if said else f"limits.check ended with {done.returncode}"


def memory_free() -> int | None:
    """Return the bytes that the kernel calls available; None where it does not say."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def memory_used() -> int | None:
    """Return the bytes of this process in memory; None where the kernel does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")
