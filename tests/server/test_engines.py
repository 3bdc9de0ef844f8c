"""The same run on three engines, and with real server and device processes."""

from pathlib import Path

import pytest
from processes import ROOT, TINY, digests, run, simulate
from superlink import superlink_run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def inline(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return digests(simulate("inline", tmp_path_factory.mktemp("inline") / "out"))


def test_flowers_simulation_gives_the_inline_engines_bytes(
    inline: dict[str, str], tmp_path: Path
) -> None:
    assert digests(simulate("flower", tmp_path / "out")) == inline


def test_flwr_run_gives_the_inline_engines_bytes(inline: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    pairs = [f"{key}={value}" for key, value in TINY.items()]
    run([str(ROOT / "deploy" / "flwr-run.sh"), str(out), "digits", *pairs])
    assert digests(out) == inline


def test_a_superlink_and_two_supernodes_give_the_inline_engines_bytes(
    inline: dict[str, str], tmp_path: Path
) -> None:
    done = superlink_run(TINY, tmp_path)
    assert digests(done.out) == inline
    # What Flower counted is what we report: its envelopes and ours differ by a few kB a message.
    messages = sum(record["devices_asked"] for record in done.rounds)
    for way, flower in (("up", done.up), ("down", done.down)):
        ours = done.counted(way)
        assert ours < flower < 1.05 * ours + 4000 * messages, way
