"""The models that a device holds: by digest, few, and never a damaged one."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from client.bases import Bases
from common.errors import DiskError
from common.state import State, state_digest
from common.update import Moved


def model(number: int) -> State:
    return {"weight": torch.full((3, 2), float(number)), "bias": torch.arange(number + 1.0)}


def files(folder: Path) -> set[str]:
    return {path.stem for path in folder.glob("*.safetensors")}


def test_a_model_is_held_by_its_digest_also_after_a_restart(tmp_path: Path) -> None:
    digest = Bases(tmp_path).put(model(1))
    assert digest == state_digest(model(1))
    for held in (Bases(tmp_path), Bases(tmp_path)):
        state = held.get(digest)
        assert state is not None
        assert state_digest(state) == digest


def test_what_was_never_held_is_none(tmp_path: Path) -> None:
    assert Bases(tmp_path).get("0" * 64) is None
    assert Bases(tmp_path / "not" / "there").get("0" * 64) is None
    assert not (tmp_path / "not").exists()


def test_what_need_not_outlast_a_power_cut_does_not_wait_for_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[int] = []
    monkeypatch.setattr(os, "fsync", waited.append)
    moved = Moved(np.arange(4, dtype=np.float16))
    for durable in (False, True):
        bases = Bases(tmp_path / str(durable), durable=durable)
        digest = bases.put(model(1))
        bases.put_moved(moved)
        bases.feedback.put("device-1", "a" * 64, 0, np.ones(3, np.float32))
        assert bool(waited) == durable
        again = Bases(tmp_path / str(durable), durable=durable)  # as another worker
        assert again.get(digest) is not None
        found = again.get_moved(moved.digest)
        assert found is not None
        assert found.distance.tobytes() == moved.distance.tobytes()
        assert again.feedback.get("device-1", "a" * 64, 1, 3).all()


def test_how_far_values_moved_is_read_from_the_disk_once(tmp_path: Path) -> None:
    moved = Moved(np.arange(4, dtype=np.float16))
    bases = Bases(tmp_path)
    bases.put_moved(moved)
    (path,) = (tmp_path / "moved").iterdir()
    path.unlink()
    assert bases.get_moved(moved.digest) is moved
    assert Bases(tmp_path).get_moved(moved.digest) is None


def test_nothing_is_written_twice(tmp_path: Path) -> None:
    bases = Bases(tmp_path)
    digest = bases.put(model(1))
    path = tmp_path / f"{digest}.safetensors"
    written = path.stat().st_ino
    bases.put(model(1))
    Bases(tmp_path).put(model(1))
    assert path.stat().st_ino == written


def test_only_the_newest_stay_on_disk_and_those_in_use_count_as_new(tmp_path: Path) -> None:
    bases = Bases(tmp_path, keep=3)
    digests = []
    for number in range(3):
        digests.append(bases.put(model(number)))
        os.utime(tmp_path / f"{digests[-1]}.safetensors", (number, number))
    assert Bases(tmp_path, keep=3).get(digests[0]) is not None  # used again, by another process
    bases.put(model(3))
    assert files(tmp_path) == {digests[0], digests[2], state_digest(model(3))}
    assert Bases(tmp_path).get(digests[1]) is None


def test_a_few_stay_in_memory_even_if_the_folder_is_emptied(tmp_path: Path) -> None:
    bases = Bases(tmp_path)
    digests = [bases.put(model(number)) for number in range(5)]
    for path in tmp_path.iterdir():
        path.unlink()
    assert [bases.get(digest) is not None for digest in digests] == [False, False, True, True, True]


def test_a_damaged_model_is_not_used_and_can_be_held_anew(tmp_path: Path) -> None:
    digest = Bases(tmp_path).put(model(1))
    path = tmp_path / f"{digest}.safetensors"
    whole = path.read_bytes()
    for damaged in (whole[:20], whole[:-1], whole[:-4] + b"\0\0\0\1", b""):
        path.write_bytes(damaged)
        bases = Bases(tmp_path)  # a new process
        assert bases.get(digest) is None
        assert bases.put(model(1)) == digest
        assert path.read_bytes() == whole
        assert Bases(tmp_path).get(digest) is not None


def test_a_folder_that_cannot_be_written_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match="cannot write"):
        Bases(tmp_path / "file" / "bases").put(model(1))
