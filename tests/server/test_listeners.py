"""Who else is told of a run: a log with its fields, metrics on loopback."""

from __future__ import annotations

import json
import re
import socket
import urllib.request
from typing import Any

import pytest

from common.config import Config
from common.errors import ConfigError, RoundError
from server.listeners import Several, listening
from server.metrics import Metrics
from server.progress import NullProgress, Progress

RECORD: dict[str, Any] = {
    "step": 1,
    "phase": "grow",
    "attempt": 0,
    "round": 2,
    "devices_asked": 4,
    "devices_used": 3,
    "heldout_accuracy": 0.75,
    "train_loss": 1.5,
    "bytes_up": 1000,
    "bytes_down": 2000,
    "seconds": 0.7,
    "resting": 1,
}


def a_run(progress: Progress) -> None:
    progress.phase(1, 2, "grow", 4, done=1)
    progress.device("device-0", "used")
    progress.device("device-1", "refused", "not finite")
    progress.abandoned("too few")
    progress.round_done(RECORD)
    progress.device("device-0", "late")
    progress.message("device-1 rests")


def test_everyone_is_told_everything() -> None:
    told: list[list[str]] = [[], []]

    class Listening(Progress):
        def __init__(self, heard: list[str]) -> None:
            for name in vars(Progress):
                if not name.startswith("_"):
                    setattr(self, name, lambda *a, name=name, **k: heard.append(name))

    several = Several([Listening(heard) for heard in told])
    a_run(several)
    several.plan(3, 1)
    several.stage("export", None)
    several.advance()
    several.device_done(1, 4)
    assert told[0] == told[1]
    own = {name for name in vars(Progress) if not name.startswith("_")}
    assert set(told[0]) == own == {name for name in vars(Several) if not name.startswith("_")}


def test_a_log_has_run_step_round_and_device_in_every_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = Config(log="json")

    def fails() -> None:
        with listening(config, NullProgress()) as progress:
            a_run(progress)
            raise RoundError("nobody came")

    with pytest.raises(RoundError):
        fails()
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert {line["run"] for line in lines} == {config.digest[:12]}
    kinds = [line["event"] for line in lines]
    assert kinds == ["phase", "device", "device", "abandoned", "round", "device", "message", "end"]
    assert all(re.match(r"\d{4}-\d\d-\d\dT[\d:.]+\+00:00$", line["time"]) for line in lines)
    assert all((line["step"], line["phase"]) == (1, "grow") for line in lines)
    assert [line["round"] for line in lines] == [2, 2, 2, 2, 2, 3, 3, 3]
    refused = lines[2]
    assert (refused["level"], refused["device"]) == ("warning", "device-1")
    assert (refused["outcome"], refused["reason"]) == ("refused", "not finite")
    assert (lines[-1]["level"], lines[-1]["error"]) == ("error", "nobody came")


def test_a_log_as_text_is_one_line_an_event(capsys: pytest.CaptureFixture[str]) -> None:
    with listening(Config(log="text"), NullProgress()) as progress:
        a_run(progress)
        progress.message("two\nlines")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 9
    assert 'warning device run="' in lines[2]
    assert lines[2].endswith('device="device-1" outcome="refused" reason="not finite"')
    with listening(Config(), NullProgress()) as progress:  # off, and the handler is gone
        a_run(progress)
    assert capsys.readouterr().err == ""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def test_metrics_are_served_while_the_run_lasts() -> None:
    config = Config(metrics_port=free_port())
    url = f"http://127.0.0.1:{config.metrics_port}/metrics"
    with listening(config, NullProgress()) as progress:
        a_run(progress)
        with urllib.request.urlopen(url, timeout=10) as answer:
            text = answer.read().decode()
        with pytest.raises(ConfigError, match=f"metrics-port is {config.metrics_port}: cannot"):
            listening(config, NullProgress()).__enter__()
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert values["fallow_step"] == "1.0"
    assert values['fallow_round{phase="grow"}'] == "2.0"
    assert values['fallow_rounds_total{phase="grow"}'] == "1.0"
    assert values["fallow_rounds_abandoned_total"] == "1.0"
    assert values['fallow_device_outcomes_total{outcome="refused",phase="grow"}'] == "1.0"
    assert values['fallow_bytes_total{way="down"}'] == "2000.0"
    assert values["fallow_heldout_accuracy"] == "0.75"
    assert values["fallow_devices_resting"] == "1.0"
    assert values['fallow_round_seconds_bucket{le="1.0",phase="grow"}'] == "1.0"
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(url, timeout=5)


def test_metrics_never_name_a_device() -> None:
    from prometheus_client import generate_latest

    metrics = Metrics(Config())
    a_run(metrics)
    assert b"device-1" not in generate_latest(metrics.registry)
    assert Config().metrics_host == "127.0.0.1"
    assert Config().metrics_port == 0
