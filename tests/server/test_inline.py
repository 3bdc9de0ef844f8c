"""The inline engine: a Flower grid of worker processes, whose number changes nothing."""

from __future__ import annotations

import json
import pickle
import signal
import subprocess
import sys
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_grid import DirectGrid
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.supercore.run import Run

import server.run
from common.config import Config
from common.errors import ConfigError
from common.state import state_digest
from server.inline import Elsewhere, InlineGrid, Shelf, _identify, picked_up, put_down
from server.progress import NullProgress
from server.publish import Published
from server.run import conduct
from server.simulate import simulate_inline
from server.wire import hello_message, read_reply

SETTINGS: dict[str, Any] = {
    "data": "digits",
    "net": "resnet8",
    "width": 8,
    "devices": 3,
    "steps": 1,
    "prior-size": 120,
    "part-size": 120,
    "prior-epochs": 2,
    "statistics-gap": 1,  # a prior so little trained falls behind its statistics
    "freeing-epochs": 1,
    "rounds": 2,
    "epochs": 1,
    "consolidate-rounds": 1,
    "consolidate-epochs": 1,
    "max-drop": 1.0,
    "accept-drop": 1.0,
}


def config(**settings: Any) -> Config:
    return Config.parse({**SETTINGS, **settings})


def model_bytes(out: Path) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for p in out.glob("models/*/*")}


def test_the_number_of_workers_changes_no_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, states = server.run.publish, []

    def light(world: Any, state: Any, *rest: Any, **named: Any) -> Published:
        with monkeypatch.context() as patch:  # everything but the export, which takes seconds
            patch.setattr(
                "server.publish.export_onnx",
                lambda slim, path, **_: type("Written", (), {"bytes": 1})(),
            )
            patch.setattr("server.publish.check_parity", lambda *_: 0.0)
            states.append(state_digest(state))
            return real(world, state, *rest, **named)

    monkeypatch.setattr(server.run, "publish", light)
    for workers in (1, 2):
        simulate_inline(
            config(workers=workers),
            tmp_path / str(workers),
            resume=False,
            progress=NullProgress(),
            command=None,
        )
    conduct(
        DirectGrid(config(), tmp_path / "cache"),
        config(),
        tmp_path / "0",
        engine="inline",
        resume=False,
        progress=NullProgress(),
    )
    files = [model_bytes(tmp_path / str(workers)) for workers in (0, 1, 2)]
    assert files[0] == files[1] == files[2]
    names = ("model.safetensors", "free.json", "memory.safetensors")
    assert set(files[0]) == {f"models/step-{step}/{name}" for step in (0, 1) for name in names}
    assert states[:2] == states[2:4] == states[4:]
    assert states[0] != states[1]


def grid(**options: Any) -> InlineGrid:
    return InlineGrid(**{"settings": {}, "devices": 5, "workers": 2, "cache": "none", **options})


def test_there_is_a_node_for_every_device() -> None:
    assert list(grid().get_node_ids()) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(("workers", "count"), [(1, 1), (2, 2), (99, 5)])
def test_there_are_never_more_workers_than_devices(workers: int, count: int) -> None:
    assert grid(workers=workers)._count == count


def test_without_a_number_there_is_a_worker_a_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 3, 7})
    assert grid(workers=0)._count == 3


def test_a_grid_that_asks_nobody_starts_no_process() -> None:
    with grid() as entered:
        assert entered._pool is not None
        assert not entered._pool._processes
        run = Run.create_empty(run_id=7)
        entered.set_run(run)
        assert entered.run is run


class Later:
    """A pool whose work is done when the test says so."""

    def __init__(self) -> None:
        self.handed: list[tuple[Future[Message], dict[str, Any], Message]] = []

    def submit(self, _: Any, settings: Any, node: dict[str, Any], message: Message) -> Any:
        future: Future[Message] = Future()
        self.handed.append((future, node, message))
        return future

    def finish(self, *which: int) -> None:
        for number in which:
            future, _, message = self.handed[number]
            future.set_result(Message(RecordDict(), reply_to=message))


@pytest.fixture
def later() -> tuple[InlineGrid, Later]:
    made, pool = DirectGrid(config(devices=5), Path("none")), Later()
    made._pool = pool  # type: ignore[assignment]
    return made, pool


def sent(node: int, array: Array) -> Message:
    content = RecordDict({"arrays": ArrayRecord({"base": array})})
    return Message(content, dst_node_id=node, message_type="train")


def test_what_goes_to_many_lies_in_one_file_until_all_have_answered(tmp_path: Path) -> None:
    _identify()  # no message is made without
    shelf = Shelf(tmp_path, least=200)
    large, small = Array(np.arange(100.0)), Array(np.arange(2, dtype=np.uint8))
    messages = [sent(node, large) for node in (1, 2, 3)]
    short = [shelf.shortened(message) for message in messages]
    (path,) = tmp_path.iterdir()
    assert path.read_bytes() == large.data
    for made, message in zip(short, messages, strict=True):
        assert len(pickle.dumps(made)) < 2000
        assert message.content.array_records["arrays"]["base"].data == large.data
        again = pickle.loads(pickle.dumps(made))
        assert again.metadata.dst_node_id == message.metadata.dst_node_id
        assert again.content.array_records["arrays"]["base"].data == Elsewhere(str(path))
    little = sent(4, small)
    assert shelf.shortened(little) is little

    others = [shelf.shortened(sent(1, Array(np.arange(100.0) + n))) for n in range(1, 4)]
    answered: Future[Message] = Future()
    for made in others:
        shelf.done_with(made)(answered)
    assert path.exists()
    assert len(list(tmp_path.iterdir())) == 3  # the one in use, and the newest two
    for made in short:
        assert path.exists()
        shelf.done_with(made)(answered)
    assert not path.exists()


def test_a_large_array_of_a_reply_comes_by_file_and_the_file_is_used_again(tmp_path: Path) -> None:
    _identify()
    small = Array(np.arange(3))
    for size in (2**18, 2**17, 2**18):
        large = Array(np.arange(size, dtype=np.float32))
        content = RecordDict({"arrays": ArrayRecord({"update": large, "more": small})})
        reply = put_down(Message(content, reply_to=sent(1, small)), tmp_path / "sent")
        short = reply.content.array_records["arrays"]
        assert short["update"].data == Elsewhere(str(next((tmp_path / "sent").iterdir())))
        assert short["more"].data == small.data
        again = picked_up(pickle.loads(pickle.dumps(reply))).content.array_records["arrays"]
        assert again["update"].data == large.data
        assert again["more"].data == small.data
        (file,) = (tmp_path / "sent").iterdir()
        assert file.suffix == ".free"


def test_replies_come_as_they_are_done_and_only_once(later: tuple[InlineGrid, Later]) -> None:
    grid, pool = later
    identifiers = list(grid.push_messages([hello_message(n) for n in (3, 1, 2)]))
    assert len(set(identifiers)) == 3
    assert list(grid.pull_messages(identifiers)) == []
    pool.finish(2, 0)
    replies = list(grid.pull_messages(identifiers))
    assert [r.metadata.reply_to_message_id for r in replies] == [identifiers[0], identifiers[2]]
    assert [r.metadata.src_node_id for r in replies] == [3, 2]
    assert list(grid.pull_messages(identifiers)) == []
    pool.finish(1)
    assert len(list(grid.pull_messages(identifiers))) == 1


def test_every_device_is_told_which_one_it_is(later: tuple[InlineGrid, Later]) -> None:
    grid, pool = later
    grid.push_messages([hello_message(4)])
    assert pool.handed[0][1] == {"partition-id": 3, "num-partitions": 5, "cache": "none"}


def test_waiting_for_all_ends_at_its_time_limit(later: tuple[InlineGrid, Later]) -> None:
    grid, _ = later
    began = time.monotonic()
    assert list(grid.send_and_receive([hello_message(1)], timeout=0.05)) == []
    assert 0.05 <= time.monotonic() - began < 2


def test_what_goes_wrong_in_a_device_is_raised_here(later: tuple[InlineGrid, Later]) -> None:
    grid, pool = later
    identifiers = list(grid.push_messages([hello_message(1)]))
    pool.handed[0][0].set_exception(ConfigError("a clear reason"))
    with pytest.raises(ConfigError, match="a clear reason"):
        grid.pull_messages(identifiers)


def test_a_reply_that_is_there_beside_a_failure_is_not_lost(
    later: tuple[InlineGrid, Later],
) -> None:
    grid, pool = later
    identifiers = list(grid.push_messages([hello_message(n) for n in (1, 2)]))
    pool.handed[0][0].set_exception(ConfigError("a clear reason"))
    pool.finish(1)
    with pytest.raises(ConfigError):
        grid.pull_messages(identifiers)
    assert len(list(grid.pull_messages(identifiers))) == 1


def test_the_real_devices_answer(tmp_path: Path) -> None:
    direct = DirectGrid(config(), tmp_path)
    replies = list(direct.send_and_receive([hello_message(n) for n in direct.get_node_ids()]))
    names = {r.metadata.src_node_id: read_reply(r).report.device for r in replies}
    assert names == {1: "device-00000", 2: "device-00001", 3: "device-00002"}


def descendants(process: int) -> set[int]:
    tasks = Path(f"/proc/{process}/task").glob("*/children")
    mine = {int(child) for task in tasks for child in task.read_text().split()}
    return mine.union(*(descendants(child) for child in mine))


@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGTERM])
def test_no_worker_outlives_the_server(tmp_path: Path, by: signal.Signals) -> None:
    command = [sys.executable, "-m", "server.cli", "simulate", "--workers=2", "--rounds=500"]
    command += [f"--set={k}={v}" for k, v in SETTINGS.items() if k != "rounds"]
    out = tmp_path / "out"
    server = subprocess.Popen(
        [*command, "--out", str(out)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert server.stdout is not None
    for line in server.stdout:
        if "grow round 2/" in line:
            break
    workers = descendants(server.pid)  # and what they are forked from
    assert len(workers) >= 3
    server.send_signal(by)
    rest = server.stdout.read()
    server.stdout.close()
    code = server.wait(30)
    if by == signal.SIGTERM:  # as a service manager stops it: nothing is lost
        assert code == 130
        assert "--resume" in rest
        assert json.loads((out / "summary.json").read_text())["status"] == "interrupted"
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        assert time.monotonic() < deadline, f"{workers} are still there"
        time.sleep(0.1)
