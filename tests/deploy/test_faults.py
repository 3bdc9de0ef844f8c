"""What a real fleet survives: processes killed, connections lost. Nothing acknowledged is lost."""

from pathlib import Path

import pytest
from fleet import FAST, cut_power, fleet
from processes import (
    digests,
    kill,
    server_app,
    simulate,
)

pytestmark = [pytest.mark.timeout(900)]
SLOW = pytest.mark.slow
CHAOS = pytest.mark.chaos


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return digests(simulate("inline", tmp_path_factory.mktemp("undisturbed") / "out", FAST))


@SLOW
def test_killed_server_processes_and_a_device_that_lost_power_change_no_byte(
    undisturbed: dict[str, str], tmp_path: Path
) -> None:
    """The short form: everything that can be killed is killed once in one run."""
    with fleet(tmp_path) as it:
        superlink = it.serve()
        devices = [it.device(0), it.device(1)]
        run = it.run(FAST)
        it.wait_for_round(1, run)

        kill(server_app(superlink))
        assert run.wait(120) == 1
        assert "goes on with it" in run.said()
        kept = it.rounds()
        run = it.run(FAST)
        it.wait_for_round(kept + 1, run)

        superlink.kill()
        assert run.wait(120) == 1
        it.serve()
        kept = it.rounds()
        run = it.run(FAST)
        it.wait_for_work(devices[1])
        cut_power(devices[1])
        it.device(1)
        assert run.wait(300) == 0, it.told()
        assert it.rounds() >= kept
        assert digests(it.out) == undisturbed
