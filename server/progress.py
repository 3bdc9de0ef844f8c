"""What a run is doing just now: a live display on a terminal, one plain line a round elsewhere.

::

    with RunProgress() as progress:
        progress.stage("training the prior model", total=10)
        progress.advance(1)
        progress.plan(32)
        progress.phase(1, 2, "grow", 10)
        progress.device_done(3, 8)
        progress.round_done(record)
"""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text


class Progress:
    """What a run tells about its progress, and to whom; a display derives from it.

    Nothing that it does changes what a run computes. As it stands here, it shows nothing.
    """

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        return None

    def plan(self, total_rounds: int, done: int = 0) -> None:
        """Expect `total_rounds` in the whole run, `done` of them in earlier sessions.

        Tell it just before the first round: the time left is judged from here on. Told again,
        it changes the expectation, as when an attempt at freeing is repeated.
        """

    def phase(self, step: int, steps: int, phase: str, rounds: int, done: int = 0) -> None:
        """Begin a phase (or another attempt at it) of `rounds` rounds, `done` before a resume.

        `step` counts from 1; 0 is the first freeing of a model that was brought.
        """

    def device_done(self, done: int, asked: int) -> None:
        """Tell how many of the devices asked in this round have answered."""

    def device(self, name: str, event: str, reason: str | None = None) -> None:
        """Tell what became of one device in a round (see `server.rounds.Watcher`)."""

    def abandoned(self, reason: str) -> None:
        """Tell that a try at a round came to nothing."""

    def round_done(self, record: dict[str, Any]) -> None:
        """End a round with its record, a line of ``rounds.jsonl``."""

    def stage(self, name: str, total: int | None = None) -> None:
        """Begin work that has no rounds, in `total` pieces if that is known."""

    def advance(self, pieces: int = 1) -> None:
        """Tell that so many more pieces of the stage are done."""

    def message(self, text: str) -> None:
        """Show a line that stays."""


class NullProgress(Progress):
    """Shows nothing, for tests and for whoever wants silence."""


class RunProgress(Progress):
    """The display of a run.

    Parameters
    ----------
    console : Console, optional
        Where to; by default standard output. If it is no terminal (or a dumb one), every round
        is a plain line without control codes.
    clock : callable, optional
        Monotonic seconds.
    """

    def __init__(
        self, console: Console | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._console = console or Console()
        self._clock = clock
        self._began = clock()
        self._where = ""
        self._done, self._total = 0, 0  # rounds of this phase, or pieces of this stage
        self._in_rounds = False
        self._devices: tuple[int, int] | None = None
        self._accuracy: float | None = None
        self._bytes = {"up": 0, "down": 0}
        self._estimate = RoundTimes()
        # Not console.is_terminal: FORCE_COLOR makes that true for files too.
        terminal = self._console.file.isatty() and not self._console.is_dumb_terminal
        self._live: Live | None = None
        if terminal:
            self._live = Live(console=self._console, get_renderable=self._render, transient=True)

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live:
            self._live.stop()

    def plan(self, total_rounds: int, done: int = 0) -> None:  # noqa: D102
        self._estimate.plan(total_rounds, done, self._clock())

    def phase(self, step: int, steps: int, phase: str, rounds: int, done: int = 0) -> None:  # noqa: D102
        self._where = f"step {step}/{steps} {phase}" if step else f"first freeing, {phase}"
        self._done, self._total = done, rounds
        self._in_rounds, self._devices = True, None

    def device_done(self, done: int, asked: int) -> None:  # noqa: D102
        self._devices = (done, asked)

    def round_done(self, record: dict[str, Any]) -> None:  # noqa: D102
        self._done += 1
        self._accuracy = record["heldout_accuracy"]
        for way in self._bytes:
            self._bytes[way] += record[f"bytes_{way}"]
        self._devices = None
        self._estimate.round_done(self._clock())
        if not self._live:
            used = f"devices {record['devices_used']}/{record['devices_asked']}"
            self._print(", ".join([f"{self._position(self._done)}: {used}", *self._facts()]))

    def stage(self, name: str, total: int | None = None) -> None:  # noqa: D102
        self._where, self._done, self._total = name, 0, total or 0
        self._in_rounds = False
        if not self._live:
            self._print(name)

    def advance(self, pieces: int = 1) -> None:  # noqa: D102
        self._done += pieces

    def message(self, text: str) -> None:  # noqa: D102
        self._print(text)

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _position(self, number: int) -> str:
        if self._in_rounds:
            return f"{self._where} round {min(number, self._total)}/{self._total}"
        return f"{self._where} {self._done}/{self._total}" if self._total else self._where

    def _facts(self) -> list[str]:
        now = self._clock()
        facts = []
        if self._accuracy is not None:
            facts.append(f"held-out {100 * self._accuracy:.1f} %")
        facts += [f"{way} {count / 1e6:.2f} MB" for way, count in self._bytes.items() if count]
        facts.append(f"elapsed {clock_time(now - self._began)}")
        left = self._estimate.left(now)
        if left is not None:
            facts.append(f"left about {clock_time(left)}")
        return facts

    def _render(self) -> Group:
        facts = self._facts()
        if self._in_rounds and self._devices:
            facts.insert(0, "devices {}/{}".format(*self._devices))
        line = Table.grid(padding=(0, 1), expand=True)
        line.add_column(no_wrap=True)
        line.add_column(ratio=1)
        bar = ProgressBar(total=self._total or None, completed=self._done, pulse=not self._total)
        line.add_row(Text(self._position(self._done + 1), style="bold"), bar)
        return Group(line, Text(" · ".join(facts), style="dim"))


class RoundTimes:
    """How long the rounds that are left will take, judged by those of this session.

    What happens between rounds counts with them: the steps to come have it too.
    """

    def __init__(self) -> None:
        self._total = self._before = self._here = 0
        self._first: float | None = None
        self._last = 0.0

    def plan(self, total: int, before: int, now: float) -> None:
        """Expect `total` rounds, `before` of them in earlier sessions; the first call starts."""
        self._total, self._before = total, before
        if self._first is None:
            self._first = now

    def round_done(self, now: float) -> None:
        """Count a round that ended now."""
        self._here += 1
        self._last = now

    def left(self, now: float) -> float | None:
        """Return seconds left; None as long as nothing can be said."""
        if self._first is None or not self._here:
            return None
        rounds = max(self._total - self._before - self._here, 0)
        each = (self._last - self._first) / self._here
        return max(each * rounds - (now - self._last), 0.0)


def clock_time(seconds: float) -> str:
    """Format seconds as m:ss or h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def make_progress() -> Progress:
    """Return the display for this process's standard output."""
    return RunProgress()
