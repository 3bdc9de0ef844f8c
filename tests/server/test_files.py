"""Where checkpoints are: folder or URL, whole or not at all, one server at a time."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import fsspec
import pytest
from fake_grid import freed_prior, make_plan
from locks import locked_elsewhere
from test_checkpoint import plain

from common.errors import ConfigError, DiskError, StoreError
from server import files as module
from server.checkpoint import Checkpoint, CheckpointFolder
from server.files import FolderFiles, UrlFiles, open_files
from server.plan import start


@pytest.fixture
def memory() -> Iterator[str]:
    yield "memory://fallow/run"
    fsspec.filesystem("memory").rm("/fallow", recursive=True)


@pytest.mark.parametrize("kind", ["folder", "file", "memory"])
def test_checkpoints_go_and_come_back_wherever_they_are(
    kind: str, tmp_path: Path, memory: str
) -> None:
    place = {"folder": str(tmp_path / "c"), "file": f"file://{tmp_path}/c", "memory": memory}[kind]
    UrlFiles(memory).write("keep", b"")  # so that there is something to remove
    plan = make_plan()
    state = start(plan, *freed_prior(plan))
    store = CheckpointFolder(place, plan.config)
    with store.owned():
        assert not store.exists()
        for number in range(4):
            store.write(Checkpoint(state, {"a": ["x"]}, {}, number, {"exchanges": number}))
        read = CheckpointFolder(place, plan.config).read()
    assert plain(read.state) == plain(state)
    assert (read.rounds, read.ledger) == (3, {"exchanges": 3})
    left = [n for n in open_files(place).names("") if n.startswith("state-")]
    assert left == ["state-000002.json", "state-000003.json"]
    assert len(open_files(place).names("tensors")) == 2


def test_a_torn_newest_state_in_a_store_costs_a_round(memory: str) -> None:
    plan = make_plan()
    state = start(plan, *freed_prior(plan))
    store = CheckpointFolder(memory, plan.config)
    for number in range(2):
        store.write(Checkpoint(state, rounds=number))
    files = UrlFiles(memory)
    data = files.read("state-000001.json")
    files.write("state-000001.json", data[: len(data) // 2])
    assert store.read().rounds == 0


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("nosuch://bucket/x", "nosuch"),
        pytest.param(
            "s3://bucket/x",
            "s3fs",
            marks=pytest.mark.skipif(find_spec("s3fs") is not None, reason="s3fs is installed"),
        ),
    ],
)
def test_a_store_that_cannot_be_opened_is_refused_by_name(url: str, why: str) -> None:
    with pytest.raises(ConfigError, match=f"checkpoint-store is '{url}': .*{why}"):
        open_files(url)


def test_a_store_that_fails_is_one_clear_error(
    memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = UrlFiles(memory)
    files.write("a", b"1")

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("bucket\nis gone")

    monkeypatch.setattr(files._files, "pipe_file", broken)
    monkeypatch.setattr(files._files, "cat_file", broken)
    with pytest.raises(DiskError, match="cannot write memory://fallow/run/a: RuntimeError bucket"):
        files.write("a", b"2")
    with pytest.raises(StoreError, match="cannot be read: RuntimeError bucket is gone"):
        files.read("a")


def test_a_second_server_on_one_store_is_refused(memory: str) -> None:
    with UrlFiles(memory).owned(), pytest.raises(StoreError, match=r"another server \(.*process"):
        UrlFiles(memory).owned().__enter__()
    with UrlFiles(memory).owned():  # the first has gone
        pass
    assert UrlFiles(memory).names("") == []
    UrlFiles(memory).write("x", b"")


def test_a_lease_that_is_not_renewed_is_worth_nothing(memory: str) -> None:
    stale = {"owner": "killed", "beat": time.time() - 1000}
    UrlFiles(memory).write("owner", json.dumps(stale).encode())
    with UrlFiles(memory).owned():
        pass
    for rubbish in (b"[]", b"{", b'{"beat": 1}'):
        UrlFiles(memory).write("owner", rubbish)
        with UrlFiles(memory).owned():
            pass
    UrlFiles(memory).write("x", b"")


def test_a_server_whose_store_was_taken_writes_no_more(
    memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_LEASE_SECONDS", 0.04)
    first = UrlFiles(memory)
    with first.owned():
        other = {"owner": "the other", "beat": time.time() + 1000}
        deadline = time.monotonic() + 10
        while first._taken_by is None and time.monotonic() < deadline:
            fsspec.filesystem("memory").pipe_file("/fallow/run/owner", json.dumps(other).encode())
            time.sleep(0.01)
        with pytest.raises(StoreError, match=r"taken over by another server \(the other\)"):
            first.write("state", b"")
    assert json.loads(UrlFiles(memory).read("owner")) == other  # and leaves the other's lease


def test_a_second_server_on_one_folder_is_refused(tmp_path: Path) -> None:
    with (
        locked_elsewhere(tmp_path / ".lock"),
        pytest.raises(StoreError, match="another run works"),
    ):
        FolderFiles(tmp_path).owned().__enter__()
    with FolderFiles(tmp_path).owned():
        pass


def test_what_a_killed_writer_left_is_cleared_away_and_nothing_else(tmp_path: Path) -> None:
    left = [tmp_path / ".state-000001.json.abc", tmp_path / "tensors" / ".1f.safetensors.xyz"]
    mine = [tmp_path / ".profile.old", tmp_path / "state-000001.json", tmp_path / "tensors" / ".x"]
    (tmp_path / "tensors").mkdir()
    for path in (*left, *mine):
        path.write_text("")
    with FolderFiles(tmp_path).owned():
        assert not any(path.exists() for path in left)
        assert all(path.exists() for path in mine)
