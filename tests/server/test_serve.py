"""`fallow serve` and `fallow run`: what they start, and what they refuse before they do."""

import json
import os
import socket
import stat
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from processes import free_port

from common.errors import ConfigError, DiskError, FallowError, StoreError
from server import cli, serve
from server.serve import start_run

Started = tuple[str, list[str], dict[str, str]]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Started]:
    """Note what the process would become, and stay what it is."""
    seen: list[Started] = []
    monkeypatch.setattr(os, "execve", lambda *what: seen.append(what))
    monkeypatch.chdir(Path.cwd())
    return seen


@pytest.fixture
def certs(tmp_path: Path) -> Path:
    folder = tmp_path / "server"
    folder.mkdir()
    for name in ("ca.crt", "server.crt", "server.key"):
        (folder / name).write_text("")
    return folder


def test_a_superlink_has_tls_and_keys_and_listens_on_loopback_alone(
    started: list[Started], certs: Path, tmp_path: Path
) -> None:
    port = free_port()
    serve.serve(tmp_path / "state", certs, port)
    ((program, command, environment),) = started
    assert Path(program).name == "flower-superlink"
    assert "--enable-supernode-auth" in command
    assert f"--ssl-keyfile={certs / 'server.key'}" in command
    assert "--insecure" not in command
    assert [c for c in command if "host" in c or "address" in c] == ["--host=127.0.0.1"]
    assert f"--database={tmp_path / 'state' / 'superlink.db'}" in command
    assert environment["FLWR_HOME"] == str(tmp_path / "state" / "flwr")
    assert environment["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] == "1"
    assert connection(tmp_path) == {
        "address": f"localhost:{port}",
        "root-certificates": str(certs / "ca.crt"),
    }
    assert stat.S_IMODE((tmp_path / "state").stat().st_mode) == 0o700


def test_insecure_is_on_loopback_too(started: list[Started], tmp_path: Path) -> None:
    port = free_port()
    serve.serve(tmp_path / "state", None, port)
    ((_, command, _),) = started
    assert "--insecure" in command
    assert "--host=127.0.0.1" in command
    assert "--enable-supernode-auth" not in command
    assert connection(tmp_path) == {"address": f"127.0.0.1:{port}", "insecure": True}


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "certs is not set"),
        (["--insecure", "--certs", "x"], "exclude one another"),
        (["--certs", "nowhere"], "certs is nowhere, which has no ca.crt"),
    ],
)
def test_neither_tls_nor_its_absence_is_guessed(
    flags: list[str],
    said: str,
    started: list[Started],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["fallow", "serve", "state", *flags])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    assert said in capsys.readouterr().err
    assert started == []


def test_a_second_superlink_on_one_folder_is_refused(
    started: list[Started], tmp_path: Path
) -> None:
    serve.serve(tmp_path / "state", None, free_port())
    with pytest.raises(StoreError, match="another SuperLink works in"):
        serve.serve(tmp_path / "state", None, free_port())
    assert len(started) == 1


def test_a_port_in_use_is_said_before_anything_starts(
    started: list[Started], tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port is {port}: address already in use"):
            serve.serve(tmp_path / "state", None, port)
    assert started == []


def test_a_state_that_cannot_be_a_folder_is_a_disk_error(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("")
    with pytest.raises(DiskError, match="cannot write in"):
        serve.serve(tmp_path / "state", None, free_port())


class FakeFlower:
    """A flwr that notes what it is asked, and answers as told."""

    def __init__(self, folder: Path) -> None:
        self.state, self.out = folder / "state", folder / "out"
        (self.state / "flwr").mkdir(parents=True)
        (self.state / "work").mkdir()
        (self.state / "flwr" / "config.toml").write_text("")
        self._folder = folder
        self.program = folder / "flwr"
        self.program.write_text(
            f"#!{sys.executable}\n"
            "import json, pathlib, sys\n"
            f"folder = pathlib.Path({str(folder)!r})\n"
            "verb, *rest = sys.argv[1:]\n"
            "config = [a.partition('=')[2] for a in rest if a.startswith('--run-config=')]\n"
            "told = pathlib.Path(config[0]).read_text() if config else ''\n"
            "with (folder / 'asked').open('a') as file:\n"
            "    file.write(json.dumps([verb, rest, told]) + '\\n')\n"
            "answers = json.loads((folder / 'answers').read_text())\n"
            "print('Some text before', json.dumps(answers[verb]))\n"
        )
        self.program.chmod(0o755)
        self.answer("finished:completed")

    def answer(self, status: str, **others: Any) -> None:
        answers = {
            "list": {"success": True, "runs": [{"status": status}]},
            "run": {"success": True, "run-id": "7"},
            "log": {},
            "stop": {"success": True},
        }
        (self._folder / "answers").write_text(json.dumps({**answers, **others}))

    def summary(self, status: str, error: str | None = None) -> None:
        self.out.mkdir(exist_ok=True)
        (self.out / "summary.json").write_text(json.dumps({"status": status, "error": error}))

    def asked(self, verb: str) -> list[list[Any]]:
        lines = (self._folder / "asked").read_text().splitlines()
        return [asked for asked in map(json.loads, lines) if asked[0] == verb]


@pytest.fixture
def flower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeFlower:
    fake = FakeFlower(tmp_path)
    monkeypatch.setattr(serve, "_program", lambda name: str(fake.program))
    return fake


def test_a_run_is_told_its_settings_and_always_goes_on(
    flower: FakeFlower, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "it's here").mkdir()
    flower.summary("complete")
    settings = {"data": "it's here", "max_drop": "0.5", "flip": "false", "rounds": "3"}
    start_run(flower.state, flower.out, settings)
    ((_, rest, told),) = flower.asked("run")
    assert (Path(rest[0]) / "pyproject.toml").is_file()
    assert tomllib.loads(told) == {
        "data": str(tmp_path / "it's here"),
        "max-drop": 0.5,
        "flip": False,
        "rounds": 3,
        "out": str(flower.out),
        "resume": True,
    }
    assert list((flower.state / "work").iterdir()) == []


@pytest.mark.parametrize(
    ("status", "summary", "said"),
    [
        ("finished:failed", ("failed", "no devices"), "fallow says failed: no devices"),
        ("finished:failed", None, "fallow says nothing: see the SuperLink's log"),
        ("finished:completed", None, "finished:completed, fallow says nothing"),
        ("finished:stopped", ("complete", None), "finished:stopped, fallow says complete"),
    ],
)
def test_a_run_that_is_not_complete_is_an_error(
    status: str, summary: tuple[str, str | None] | None, said: str, flower: FakeFlower
) -> None:
    flower.answer(status)
    if summary is not None:
        flower.summary(*summary)
    with pytest.raises(FallowError, match=f"run 7 is .*{said}.*goes on with it"):
        start_run(flower.state, flower.out, {})


def test_a_run_without_a_superlink_is_refused(flower: FakeFlower, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no SuperLink's folder: start `fallow serve"):
        start_run(tmp_path / "elsewhere", flower.out, {})
    with pytest.raises(ConfigError, match="rounds"):
        start_run(flower.state, flower.out, {"rounds": "many"})


def test_what_flower_says_of_a_failure_is_passed_on(flower: FakeFlower) -> None:
    problem = {"success": False, "error-message": "first line\nthe FAB is too big"}
    flower.answer("finished:completed", run=problem)
    with pytest.raises(FallowError, match="flwr run: the FAB is too big"):
        start_run(flower.state, flower.out, {})


def connection(folder: Path) -> dict[str, Any]:
    text = (folder / "state" / "flwr" / "config.toml").read_text()
    found: dict[str, Any] = tomllib.loads(text)["superlink"]["fallow"]
    return found
