"""The same run on three engines, and with real server and device processes."""

from pathlib import Path

import pytest
from processes import (
    ROOT,
    TINY,
    device_command,
    digests,
    free_port,
    process,
    run,
    simulate,
    status,
    toml,
    wait_for,
)

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
    port, out = free_port(), tmp_path / "out"
    home = tmp_path / "operator"
    home.mkdir()
    (home / "config.toml").write_text(
        '[superlink]\ndefault = "local"\n\n'
        f'[superlink.local]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    )
    overrides = " ".join(f"{key}={toml(value)}" for key, value in TINY.items() if key != "devices")
    overrides += f" devices=2 out='{out}' data='digits'"
    with process("superlink", tmp_path, ["flower-superlink", "--insecure", "--port", str(port)]):
        wait_for(port)
        commands = [
            device_command(n, f"127.0.0.1:{port}", tmp_path, ["--insecure"]) for n in range(2)
        ]
        with (
            process("device-0", tmp_path, commands[0]),
            process("device-1", tmp_path, commands[1]),
        ):
            run(
                ["flwr", "run", str(ROOT), "local", "--stream", "--run-config", overrides],
                FLWR_HOME=str(home),
            )
    assert status(out) == "complete", (tmp_path / "superlink.log").read_text()[-3000:]
    assert digests(out) == inline
