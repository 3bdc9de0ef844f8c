"""What a device still owes: by phase and round, kept over restarts, and no matter if it is lost."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from client.feedback import Feedback

PHASE, OTHER = "a" * 64, "b" * 64


def left(number: int, size: int = 50) -> np.ndarray:
    return np.random.default_rng(number).normal(size=size).astype(np.float32) * 1e-4


def owed(folder: Path, number: int, phase: str = PHASE, device: str = "device-1") -> np.ndarray:
    return Feedback(folder).get(device, phase, number, 50)  # as a new process does


def same(read: np.ndarray, kept: np.ndarray) -> bool:
    return bool(np.allclose(read, kept, rtol=1e-3, atol=1e-12))


def test_a_round_begins_with_what_the_last_one_left(tmp_path: Path) -> None:
    assert not owed(tmp_path, 0).any()
    for number in range(4):
        Feedback(tmp_path).put("device-1", PHASE, number, left(number))
        assert same(owed(tmp_path, number + 1), left(number))
        assert same(owed(tmp_path, number + 5), left(number))  # rounds in between were others'


def test_a_round_that_is_played_again_begins_as_it_did(tmp_path: Path) -> None:
    for number in (0, 2, 5):
        Feedback(tmp_path).put("device-1", PHASE, number, left(number))
    assert same(owed(tmp_path, 5), left(2))
    Feedback(tmp_path).put("device-1", PHASE, 5, left(50))
    assert same(owed(tmp_path, 5), left(2))
    assert same(owed(tmp_path, 6), left(50))
    assert not owed(tmp_path, 2).any()  # two are kept


def test_phases_and_devices_owe_nothing_to_each_other(tmp_path: Path) -> None:
    Feedback(tmp_path).put("device-1", PHASE, 0, left(0))
    assert not owed(tmp_path, 1, OTHER).any()
    assert not owed(tmp_path, 1, device="../device-1").any()
    Feedback(tmp_path).put("device-1", OTHER, 0, left(1))
    assert not owed(tmp_path, 1).any()
    Feedback(tmp_path).put("../device-1", PHASE, 0, left(2))
    assert same(owed(tmp_path, 1, OTHER), left(1))
    assert len(list(tmp_path.iterdir())) == 2
    assert all(path.parent == tmp_path for path in tmp_path.rglob("*"))


@pytest.mark.parametrize("damage", [b"", b"no safetensors", None])
def test_what_is_lost_or_damaged_is_no_error(tmp_path: Path, damage: bytes | None) -> None:
    feedback = Feedback(tmp_path)
    feedback.put("device-1", PHASE, 0, left(0))
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-1] if damage is None else damage)
    assert not owed(tmp_path, 1).any()
    feedback.put("device-1", PHASE, 1, left(1))
    assert same(owed(tmp_path, 2), left(1))
