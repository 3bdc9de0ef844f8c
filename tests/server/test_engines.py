"""The same run on three engines, and with real server and device processes."""

import hashlib
from pathlib import Path

import pytest
from superlink import BIN, ROOT, run, superlink_run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

TINY = {
    "net": "resnet8",
    "width": "8",
    "devices": "2",
    "steps": "1",
    "rounds": "2",
    "prior-epochs": "3",
    "freeing-epochs": "2",
    "consolidate-rounds": "2",
    "max-drop": "1.0",
    "accept-drop": "1.0",
}


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


def simulate(engine: str, out: Path) -> Path:
    given = [f"--{key}={TINY[key]}" for key in ("net", "width", "devices", "steps", "rounds")]
    others = [f"--set={k}={v}" for k, v in TINY.items() if f"--{k}={v}" not in given]
    command = [str(BIN / "fallow"), "simulate", "--data=digits", f"--engine={engine}"]
    run([*command, *given, *others, "--out", str(out)])
    return out


def digests(out: Path) -> dict[str, str]:
    """Return the digest of every model that a run published."""
    files = [p for p in sorted((out / "models").rglob("*")) if p.is_file()]
    assert len(files) >= 6, f"{out} has only {files}"
    return {
        str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files
    }
