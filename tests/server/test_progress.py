"""The progress display: what it shows on a terminal, and in a file."""

from __future__ import annotations

import inspect
import io
from collections.abc import Iterator
from typing import Any

import pytest
from rich.console import Console

from server.progress import (
    NullProgress,
    Progress,
    RoundTimes,
    RunProgress,
    clock_time,
    make_progress,
)


class Clock:
    """Seconds that pass only when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    """A file that says that it is a terminal."""

    def isatty(self) -> bool:
        return True


def record(**changed: Any) -> dict[str, Any]:
    return {
        "devices_asked": 8,
        "devices_used": 7,
        "heldout_accuracy": 0.6634,
        "bytes_up": 1_500_000,
        "bytes_down": 2_250_000,
    } | changed


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def file() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def plain(file: io.StringIO, clock: Clock) -> Iterator[RunProgress]:
    with RunProgress(Console(file=file, width=80), clock) as progress:
        yield progress


def shown(progress: RunProgress, width: int = 80) -> str:
    """The live display at this moment, as text."""
    console = Console(file=io.StringIO(), width=width)
    console.print(progress._render())
    return console.file.getvalue()  # type: ignore[attr-defined]


# In a file


def test_a_round_is_one_plain_line(plain: RunProgress, file: io.StringIO, clock: Clock) -> None:
    plain.plan(20)
    plain.phase(1, 2, "grow", 10)
    plain.device_done(3, 8)
    clock.now += 30
    plain.round_done(record())
    clock.now += 30
    plain.round_done(record(heldout_accuracy=None))
    assert file.getvalue().splitlines() == [
        "step 1/2 grow round 1/10: devices 7/8, held-out 66.3 %, up 1.50 MB, down 2.25 MB, "
        "elapsed 0:30, left about 9:30",
        "step 1/2 grow round 2/10: devices 7/8, up 3.00 MB, down 4.50 MB, "
        "elapsed 1:00, left about 9:00",
    ]


def test_no_control_codes_reach_a_file_even_when_colours_are_forced(
    monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    file = io.StringIO()
    with RunProgress(Console(file=file), clock) as progress:
        progress.stage("training the prior model", 3)
        progress.advance()
        progress.phase(1, 1, "grow", 2)
        progress.round_done(record())
        progress.message("step 1 refused: [red]worse[/red] than 0.9494")
    assert "\x1b" not in file.getvalue()
    assert "\r" not in file.getvalue()
    assert len(file.getvalue().splitlines()) == 3


def test_messages_are_shown_as_they_are(plain: RunProgress, file: io.StringIO) -> None:
    plain.message("[bold]no markup[/bold]")
    plain.message("long " * 40)
    assert file.getvalue().splitlines() == ["[bold]no markup[/bold]", "long " * 40]


def test_a_dumb_terminal_gets_plain_lines(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    monkeypatch.setenv("TERM", "dumb")
    file = Terminal()
    with RunProgress(Console(file=file), clock) as progress:
        progress.phase(1, 1, "grow", 1)
        progress.round_done(record())
    assert "\x1b" not in file.getvalue()


def test_the_first_freeing_is_no_step(plain: RunProgress, file: io.StringIO) -> None:
    plain.phase(0, 2, "weigh", 1)
    plain.round_done(record())
    assert file.getvalue().startswith("first freeing, weigh round 1/1: ")


# On a terminal


def test_the_display_shows_where_the_run_is(plain: RunProgress, clock: Clock) -> None:
    plain.plan(40)
    plain.phase(2, 4, "consolidate", 6)
    for _ in range(3):
        clock.now += 20
        plain.round_done(record())
    plain.device_done(5, 8)
    clock.now += 4
    text = shown(plain)
    assert "step 2/4 consolidate round 4/6" in text
    facts = "devices 5/8 · held-out 66.3 % · up 4.50 MB · down 6.75 MB · elapsed 1:04"
    assert " ".join(text.split()).endswith(f"{facts} · left about 12:16")


def test_a_stage_shows_its_pieces_when_their_number_is_known(plain: RunProgress) -> None:
    plain.stage("training the prior model", total=10)
    plain.advance()
    plain.advance(2)
    assert "training the prior model 3/10" in shown(plain)
    plain.stage("step 1: export")
    assert "step 1: export" in shown(plain)
    assert "/10" not in shown(plain)


def test_a_round_that_is_over_leaves_no_devices_behind(plain: RunProgress) -> None:
    plain.phase(1, 2, "grow", 10)
    plain.device_done(8, 8)
    assert "devices 8/8" in shown(plain)
    plain.round_done(record())
    assert "devices" not in shown(plain)


def test_after_a_resume_the_phase_goes_on_where_it_was(plain: RunProgress) -> None:
    plain.phase(1, 2, "grow", 10, done=4)
    assert "round 5/10" in shown(plain)


@pytest.mark.parametrize("width", [30, 80, 200])
def test_the_display_fits_the_terminal(plain: RunProgress, width: int) -> None:
    plain.plan(100)
    plain.phase(1, 2, "consolidate", 10)
    plain.round_done(record())
    assert max(map(len, shown(plain, width).splitlines())) <= width


def test_the_live_display_ends_cleanly_after_an_error(clock: Clock) -> None:
    file = Terminal()
    console = Console(file=file, force_terminal=True, width=80)

    def fail() -> None:
        with RunProgress(console, clock) as progress:
            progress.phase(1, 2, "grow", 3)
            progress.message("device 3 is slow")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    text = file.getvalue()
    assert "device 3 is slow" in text
    assert "step 1/2 grow round 1/3" in text
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1, "the cursor stays hidden"


# The time left


def test_nothing_is_said_of_the_time_left_before_the_first_round() -> None:
    times = RoundTimes()
    assert times.left(5.0) is None
    times.plan(10, 0, now=0.0)
    assert times.left(5.0) is None


def test_the_time_left_follows_the_mean_round_and_counts_down() -> None:
    times = RoundTimes()
    times.plan(10, 0, now=100.0)
    times.round_done(110.0)
    times.round_done(130.0)
    assert times.left(130.0) == 8 * 15
    assert times.left(135.0) == 8 * 15 - 5
    assert times.left(1000.0) == 0


def test_rounds_of_an_earlier_session_do_not_make_this_one_look_fast() -> None:
    times = RoundTimes()
    times.plan(10, 6, now=0.0)
    times.round_done(20.0)
    assert times.left(20.0) == 3 * 20


def test_a_repeated_attempt_changes_the_plan_and_not_the_pace() -> None:
    times = RoundTimes()
    times.plan(4, 0, now=0.0)
    for end in (10.0, 20.0, 30.0, 40.0):
        times.round_done(end)
    assert times.left(40.0) == 0
    times.round_done(50.0)
    assert times.left(50.0) == 0, "more rounds than planned are no negative time"
    times.plan(9, 0, now=50.0)
    assert times.left(50.0) == 4 * 10


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (9.6, "0:10"), (599.7, "10:00"), (3725, "1:02:05")]
)
def test_times_are_written_like_a_clock(seconds: float, text: str) -> None:
    assert clock_time(seconds) == text


# The silent one


def test_the_silent_display_takes_all_that_the_other_takes(
    capsys: pytest.CaptureFixture[str],
) -> None:
    names = [name for name in vars(Progress) if not name.startswith("_")]
    for name in names:
        told = inspect.signature(getattr(Progress, name))
        assert inspect.signature(getattr(RunProgress, name)) == told
    with NullProgress() as progress:
        progress.plan(10)
        progress.phase(1, 1, "grow", 10)
        progress.device_done(1, 8)
        progress.round_done(record())
        progress.stage("export")
        progress.advance()
        progress.message("anything")
    assert capsys.readouterr() == ("", "")


def test_by_default_the_display_writes_to_standard_output(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with make_progress() as progress:
        progress.message("hello")
    assert capsys.readouterr().out == "hello\n"
