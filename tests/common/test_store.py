"""What is on disk is whole and as it was written, or it is refused."""

import ast
import errno
import json
import math
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save

from common.errors import DiskError, StoreError
from common.state import State, state_digest
from common.store import (
    BundleStore,
    read_json,
    read_state_and_header,
    read_state_file,
    write_bytes,
    write_json,
    write_state_file,
)

PACKAGES = Path(__file__).parents[2]


def state(seed: int = 0) -> State:
    rng = np.random.default_rng(seed)
    return {
        "conv.weight": torch.from_numpy(rng.standard_normal((2, 3, 1, 1), np.float32)),
        "bn.running_var": torch.from_numpy(rng.random(2, np.float32)),
    }


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def failing(error: BaseException) -> Any:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


# ---------------------------------------------------------------- whole or not at all


def test_bytes_are_written_into_folders_that_are_made(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "c.bin"
    write_bytes(path, b"one")
    write_bytes(path, b"two")
    assert path.read_bytes() == b"two"
    assert files(path.parent) == ["c.bin"]
    assert path.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("call", ["fsync", "replace", "chmod"])
@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()])
def test_a_failure_before_the_rename_leaves_the_old_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, error: BaseException
) -> None:
    path = tmp_path / "state.json"
    write_bytes(path, b"old")
    monkeypatch.setattr(os, call, failing(error))
    expected = DiskError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert files(tmp_path) == ["state.json"], "the temporary file is gone"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_told_in_one_line_and_nothing_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    path = tmp_path / "state.json"
    write_json(path, {"round": 1})
    monkeypatch.setattr(os, "fsync", failing(OSError(code, os.strerror(code))))
    with pytest.raises(DiskError, match=r"no space left for .*state\.json: .*--resume$") as caught:
        write_json(path, {"round": 2})
    assert caught.value.exit_code == 7
    assert read_json(path) == {"round": 1}
    assert files(tmp_path) == ["state.json"]


def test_a_really_full_device_is_told(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    from common.store import disk_errors

    path = tmp_path / "out"
    with (
        pytest.raises(DiskError, match="no space left"),
        disk_errors(path),
        Path("/dev/full").open("wb", buffering=0) as file,
    ):
        file.write(b"x")


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DiskError, match=r"cannot write .*file/x\.json: "):
        write_json(tmp_path / "file" / "x.json", {})


def test_content_is_synced_before_the_rename_and_the_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace

    def traced_fsync(handle: int) -> None:
        kind = "folder" if os.path.isdir(f"/proc/self/fd/{handle}") else "file"
        calls.append(f"sync {kind}")
        fsync(handle)

    def traced_replace(*args: Any) -> None:
        calls.append("rename")
        replace(*args)

    monkeypatch.setattr(os, "fsync", traced_fsync)
    monkeypatch.setattr(os, "replace", traced_replace)
    write_bytes(tmp_path / "a", b"x")
    if not Path("/proc/self/fd").exists():
        calls = [call.split()[0] for call in calls]
        assert calls == ["sync", "rename", "sync"]
    else:
        assert calls == ["sync file", "rename", "sync folder"]


# ---------------------------------------------------------------- JSON


def test_json_comes_back_as_it_was(tmp_path: Path) -> None:
    value = {"b": [1, 2.5, None, True], "a": {"ü": "\n", "nested": {}}, "loss": 0.1 + 0.2}
    write_json(tmp_path / "x.json", value)
    assert read_json(tmp_path / "x.json") == value
    assert value == {"b": [1, 2.5, None, True], "a": {"ü": "\n", "nested": {}}, "loss": 0.1 + 0.2}


def test_numbers_that_are_not_finite_come_back(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"loss": [math.nan, math.inf]})
    assert repr(read_json(tmp_path / "x.json")["loss"]) == "[nan, inf]"


def test_equal_values_are_equal_files(tmp_path: Path) -> None:
    write_json(tmp_path / "x", {"a": 1, "b": 2})
    write_json(tmp_path / "y", {"a": 1, "b": 2})
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()


def test_no_altered_byte_of_a_json_file_goes_unseen(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    value = {"round": 12, "name": "a", "list": [1, 2]}
    write_json(path, value)
    whole = path.read_bytes()
    refused = 0
    for position in range(len(whole)):
        for bit in (0x01, 0x20):
            torn = bytearray(whole)
            torn[position] ^= bit
            path.write_bytes(torn)
            try:
                assert read_json(path) == value  # white space between tokens
            except StoreError:
                refused += 1
    assert refused > len(whole)


def test_no_torn_json_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"round": 12, "list": [1, 2]})
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(StoreError, match=r"x\.json"):
            read_json(path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        b"[]",
        b"[1, 2]",
        b'"sha256"',
        b"7",
        b"null",
        b'{"round": 1}',
        b'{"round": 1, "sha256": null}',
        b'{"round": 1, "sha256": [1]}',
        b"\xff\xfe\x00",
        pickle.dumps({"round": 1}),
    ],
)
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(StoreError, match=r"x\.json (is torn or no file of fallow|was altered)"):
        read_json(path)


def test_what_cannot_be_opened_is_a_store_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readers = (read_json, read_state_file)
    (tmp_path / "file").write_bytes(b"")
    for read in readers:
        with pytest.raises(StoreError, match="absent is not there"):
            read(tmp_path / "absent")
        with pytest.raises(StoreError, match=tmp_path.name):
            read(tmp_path)
        with pytest.raises(StoreError, match="file/inside"):
            read(tmp_path / "file" / "inside")
    monkeypatch.setattr(Path, "read_bytes", failing(PermissionError(13, "Permission denied")))
    for read in readers:
        with pytest.raises(StoreError, match=r"file .*Permission denied"):
            read(tmp_path / "file")


# ---------------------------------------------------------------- states


def test_a_state_comes_back_with_its_metadata(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_state_file(path, state(), net="resnet8", mean="[0.5]")
    found, header = read_state_and_header(path)
    assert state_digest(found) == state_digest(state())
    assert header["net"] == "resnet8"
    assert header["mean"] == "[0.5]"
    assert header["digest"] == state_digest(state())
    assert state_digest(read_state_file(path)) == state_digest(state())


def test_equal_states_are_equal_files(tmp_path: Path) -> None:
    meta = {name: name for name in "abcdefgh"}
    backwards = dict(reversed(meta.items()))
    write_state_file(tmp_path / "x", state(), **meta)
    write_state_file(tmp_path / "y", dict(reversed(state().items())), **backwards)
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()


def test_no_altered_byte_of_a_state_file_changes_what_is_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_state_file(path, state(), mean="[0.25]", net="resnet8")
    whole = path.read_bytes()
    expected = read_state_and_header(path)
    refused = 0
    for position in range(len(whole)):
        for bit in (0x01, 0x20):
            torn = bytearray(whole)
            torn[position] ^= bit
            path.write_bytes(torn)
            try:
                found, header = read_state_and_header(path)
            except StoreError:
                refused += 1
                continue
            # The key under which our header stands may be hit: then it is a foreign file.
            assert header in (expected[1], {})
            assert state_digest(found) == state_digest(expected[0])
    assert refused > 1.6 * len(whole)


def test_no_torn_state_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_state_file(path, state())
    whole = path.read_bytes()
    for length in range(0, len(whole), 3):
        path.write_bytes(whole[:length])
        with pytest.raises(StoreError, match=r"model\.safetensors"):
            read_state_file(path)


def test_a_foreign_safetensors_file_is_read_without_a_check(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(save(state(), metadata={"format": "pt", "digest": "of their own"}))
    found, header = read_state_and_header(path)
    assert state_digest(found) == state_digest(state())
    assert header == {}
    path.write_bytes(save(state()))
    assert state_digest(read_state_file(path)) == state_digest(state())


class Exploit:
    """Writes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (Path.touch, (self.mark,))


@pytest.mark.parametrize("kind", ["pickle", "torch.save"])
def test_a_pickle_is_refused_and_not_run(tmp_path: Path, kind: str) -> None:
    path, mark = tmp_path / "model.safetensors", tmp_path / "run"
    if kind == "pickle":
        path.write_bytes(pickle.dumps(Exploit(mark)))
    else:
        torch.save({"a": Exploit(mark)}, path)
    for read in (read_json, read_state_file):
        with pytest.raises(StoreError, match=r"model\.safetensors"):
            read(path)
    store = BundleStore(tmp_path)
    path.rename(store.path("0" * 64))
    with pytest.raises(StoreError):
        store.get("0" * 64)
    assert not mark.exists()


def test_no_module_loads_what_can_run_code() -> None:
    forbidden = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
    sources = [
        p for room in ("common", "server", "client") for p in (PACKAGES / room).rglob("*.py")
    ]
    assert len(sources) > 20
    for source in sources:
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [getattr(node, "module", None) or "", *(a.name for a in node.names)]
                assert not forbidden & {name.split(".")[0] for name in names}, source
            if isinstance(node, ast.Call):
                call = ast.unparse(node.func)
                assert call not in ("eval", "exec", "torch.load", "torch.jit.load"), source
                unsafe = [k for k in node.keywords if k.arg in ("allow_pickle", "weights_only")]
                assert all(ast.unparse(k.value) == "False" for k in unsafe), source


# ---------------------------------------------------------------- bundles


def aged(store: BundleStore, digest: str, seconds: int) -> None:
    """Set when a bundle was last used."""
    os.utime(store.path(digest), (1_700_000_000 - seconds,) * 2)


def test_a_bundle_is_named_by_its_digest(tmp_path: Path) -> None:
    store = BundleStore(tmp_path / "bundles")
    assert not store.has(state_digest(state()))
    digest = store.put(state())
    assert digest == state_digest(state())
    assert store.has(digest)
    assert files(store.folder) == [f"{digest}.safetensors"]
    assert state_digest(store.get(digest)) == digest
    assert store.put(state()) == digest
    assert BundleStore(tmp_path / "bundles").has(digest)


def test_an_absent_bundle_is_named(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=f"{'0' * 64}.safetensors is not there"):
        BundleStore(tmp_path).get("0" * 64)


def test_a_bundle_under_a_name_that_is_not_its_own_is_refused(tmp_path: Path) -> None:
    store = BundleStore(tmp_path)
    one, other = store.put(state(1)), store.put(state(2))
    store.path(one).write_bytes(store.path(other).read_bytes())
    with pytest.raises(StoreError, match=one):
        store.get(one)
    store.path(one).write_bytes(save(state(1)))
    with pytest.raises(StoreError, match=one):
        store.get(one)


def test_only_so_many_are_kept_and_the_least_recently_used_goes_first(tmp_path: Path) -> None:
    store = BundleStore(tmp_path, keep=3)
    digests = [store.put(state(seed)) for seed in range(3)]
    for seconds, digest in zip((30, 20, 10), digests, strict=True):
        aged(store, digest, seconds)
    store.get(digests[0])
    newest = store.put(state(3))
    assert {d for d in (*digests, newest) if store.has(d)} == {digests[0], digests[2], newest}
    assert len(files(tmp_path)) == 3


def test_putting_what_is_there_counts_as_use(tmp_path: Path) -> None:
    store = BundleStore(tmp_path, keep=2)
    one, two = store.put(state(1)), store.put(state(2))
    aged(store, one, 20)
    aged(store, two, 10)
    store.put(state(1))
    store.put(state(3))
    assert store.has(one)
    assert not store.has(two)


def test_what_was_just_put_stays_whatever_the_clock_says(tmp_path: Path) -> None:
    store = BundleStore(tmp_path, keep=2)
    for seed in (1, 2):
        os.utime(store.path(store.put(state(seed))), (4_000_000_000, 4_000_000_000))
    assert store.has(store.put(state(3)))
    assert len(files(tmp_path)) == 2


def test_without_a_limit_all_are_kept(tmp_path: Path) -> None:
    store = BundleStore(tmp_path)
    digests = [store.put(state(seed)) for seed in range(12)]
    assert all(store.has(digest) for digest in digests)


def test_what_a_killed_process_left_behind_disturbs_nobody(tmp_path: Path) -> None:
    store = BundleStore(tmp_path, keep=1)
    digest = store.put(state())
    (tmp_path / f".{digest}.safetensors.x1y2z3").write_bytes(b"half")
    assert state_digest(store.get(digest)) == digest


def test_a_bundle_is_absent_if_it_could_not_be_written_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = BundleStore(tmp_path)
    full = OSError(errno.ENOSPC, "No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing(full))
        with pytest.raises(DiskError, match="no space left"):
            store.put(state())
    assert not store.has(state_digest(state()))
    assert json.dumps(files(tmp_path)) == "[]"
    assert store.has(store.put(state()))
