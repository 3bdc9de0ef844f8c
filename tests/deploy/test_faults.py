"""What a real fleet survives: processes killed, connections lost. Nothing acknowledged is lost.

The short form runs with `make test-slow`, the rest with `make chaos`. Points in time are drawn by
a seed; what happens at them depends on the machine, and has to come out the same.
"""

import json
import random
import signal
import time
from pathlib import Path

import pytest
from fleet import FAST, Wire, cut_power, fleet
from processes import (
    Process,
    attempt,
    digests,
    kill,
    server_app,
    simulate,
    simulate_command,
    status,
)

# Patience is for a busy machine: nothing waits for its own sake.
pytestmark = [pytest.mark.timeout(3600)]
LONG = 1200


@pytest.fixture(scope="module")
def paced(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], float]:
    """Return what an undisturbed run ends in, and the seconds that it takes here."""
    began = time.monotonic()
    out = simulate("inline", tmp_path_factory.mktemp("undisturbed") / "out", FAST)
    return digests(out), time.monotonic() - began


@pytest.fixture(scope="module")
def undisturbed(paced: tuple[dict[str, str], float]) -> dict[str, str]:
    """Return what everything here has to end in."""
    return paced[0]


@pytest.mark.slow
def test_whatever_is_killed_once_changes_no_byte(tmp_path: Path) -> None:
    """The short form: ServerApp, SuperLink and a device are killed in turn in one run.

    It has rounds enough that a slow machine is not through before the last kill.
    """
    settings = {**FAST, "rounds": "3", "consolidate-rounds": "3"}
    undisturbed = digests(simulate("inline", tmp_path / "undisturbed", settings))
    with fleet(tmp_path) as it:
        superlink = it.serve()
        devices = [it.device(0), it.device(1)]
        run = it.run(settings)
        it.wait_for_round(1, run)
        second = attempt(it.run_command(settings))
        assert second.returncode == 1, "a second run worked in the same folder"
        assert run.code() is None

        kill(server_app(superlink))
        assert run.wait(LONG) == 1
        assert "goes on with it" in run.said()
        acknowledged = lines(it.out)
        run = it.run(settings)
        it.wait_for_round(len(acknowledged) + 1, run)
        assert lines(it.out)[: len(acknowledged)] == acknowledged

        superlink.kill()
        assert run.wait(LONG) == 1
        acknowledged = lines(it.out)
        it.serve()
        run = it.run(settings)
        it.wait_for_work(devices[1])
        cut_power(devices[1])
        it.device(1)
        assert run.wait(LONG) == 0, it.told()
        assert lines(it.out)[: len(acknowledged)] == acknowledged
        assert digests(it.out) == undisturbed


@pytest.mark.slow
@pytest.mark.parametrize(
    "times", [2, pytest.param(20, marks=pytest.mark.chaos)], ids=["twice", "20-times"]
)
def test_a_server_killed_at_random_points_ends_in_the_same_bytes(
    times: int, paced: tuple[dict[str, str], float], tmp_path: Path
) -> None:
    """The server's process with simulated devices: a kill costs seconds, so there are many."""
    undisturbed, seconds = paced
    out, draw = tmp_path / "out", random.Random(7)
    command = [*simulate_command("inline", out, {**FAST, "workers": "1"}), "--resume"]
    killed = 0
    while killed < times:
        started = Process(f"server-{killed}", tmp_path, command)
        acknowledged = lines(out)
        if started.ended_within(draw.uniform(0.1, 1.0) * seconds):
            assert started.code() == 0, started.said()
            assert digests(out) == undisturbed
            out.rename(tmp_path / f"complete-{killed}")  # another run for the kills to come
            continue
        started.kill()
        killed += 1
        assert lines(out)[: len(acknowledged)] == acknowledged
    done = attempt(command)
    assert done.returncode == 0, done.stderr
    assert digests(out) == undisturbed


@pytest.mark.chaos
def test_a_server_app_killed_again_and_again(undisturbed: dict[str, str], tmp_path: Path) -> None:
    draw = random.Random(11)
    with fleet(tmp_path) as it:
        superlink = it.serve()
        it.device(0)
        it.device(1)
        for _ in range(8):
            run = it.run(FAST)
            pid = server_app(superlink)
            deadline = time.monotonic() + draw.uniform(1, 60)
            while run.code() is None and time.monotonic() < deadline:
                time.sleep(0.2)
            if run.code() is None:
                acknowledged = lines(it.out)
                kill(pid)
                assert run.wait(LONG) == 1
                assert lines(it.out)[: len(acknowledged)] == acknowledged
        assert it.run(FAST).wait(LONG) == 0, it.told()
        assert digests(it.out) == undisturbed


@pytest.mark.chaos
def test_a_superlink_killed_again_and_again(undisturbed: dict[str, str], tmp_path: Path) -> None:
    draw = random.Random(13)
    with fleet(tmp_path) as it:
        superlink = it.serve()
        it.device(0)
        it.device(1)
        for _ in range(4):
            run = it.run(FAST)
            deadline = time.monotonic() + draw.uniform(5, 60)
            while run.code() is None and time.monotonic() < deadline:
                time.sleep(0.2)
            acknowledged = lines(it.out)
            superlink.kill()
            assert run.wait(LONG) in (0, 1)
            assert lines(it.out)[: len(acknowledged)] == acknowledged
            superlink = it.serve()
        assert it.run(FAST).wait(LONG) == 0, it.told()
        assert digests(it.out) == undisturbed


@pytest.mark.chaos
def test_a_device_that_loses_power_in_a_round_comes_back(
    undisturbed: dict[str, str], tmp_path: Path
) -> None:
    with fleet(tmp_path) as it:
        it.serve()
        devices = [it.device(0), it.device(1)]
        run = it.run(FAST)
        it.wait_for_round(1, run)
        it.wait_for_work(devices[1])
        cut_power(devices[1])
        it.device(1)
        assert run.wait(LONG) == 0, it.told()
        assert digests(it.out) == undisturbed


@pytest.mark.chaos
def test_a_round_goes_on_without_a_device_that_never_comes_back(tmp_path: Path) -> None:
    """Half of the devices are enough for `quorum`: what the others did is not lost."""
    settings = {**FAST, "quorum": "0.5", "min-devices": "1"}
    with fleet(tmp_path) as it:
        it.serve()
        devices = [it.device(0), it.device(1)]
        run = it.run(settings)
        it.wait_for_work(devices[1])
        it.wait_for_round(1, run)
        cut_power(devices[1])
        assert run.wait(LONG) == 0, it.told()
        assert status(it.out) == "complete"
        used = [json.loads(line)["devices_used"] for line in lines(it.out)]
        assert used[-1] == 1
        assert len(used) == 4


@pytest.mark.chaos
def test_a_line_that_goes_dead_without_closing(undisturbed: dict[str, str], tmp_path: Path) -> None:
    """Half-open TCP: the device's connections stay open, nothing comes through, then it does."""
    with fleet(tmp_path) as it:
        it.serve()
        wire = Wire(it.port)
        try:
            it.device(0)
            far = it.device(1, f"127.0.0.1:{wire.port}")
            run = it.run({**FAST, "round-timeout": "90"})
            it.wait_for_round(1, run)
            it.wait_for_work(far)
            wire.cut()
            time.sleep(100)  # longer than the SuperLink holds the device for alive
            assert run.code() is None, it.told()
            wire.mend()
            assert run.wait(LONG) == 0, it.told()
            assert digests(it.out) == undisturbed
        finally:
            wire.close()


@pytest.mark.chaos
def test_a_device_that_hangs_and_goes_on(undisturbed: dict[str, str], tmp_path: Path) -> None:
    with fleet(tmp_path) as it:
        it.serve()
        devices = [it.device(0), it.device(1)]
        run = it.run(FAST)
        it.wait_for_round(1, run)
        devices[1].signal(signal.SIGSTOP)
        time.sleep(75)
        devices[1].signal(signal.SIGCONT)
        assert run.wait(LONG) == 0, it.told()
        assert digests(it.out) == undisturbed


def lines(out: Path) -> list[str]:
    """Return the rounds that are on disk."""
    path = out / "rounds.jsonl"
    return path.read_text().splitlines() if path.exists() else []
