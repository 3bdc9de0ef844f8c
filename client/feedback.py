"""What coding took from a device's updates, kept until its next update of the phase."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from common.codec import decode, encode, no_rows
from common.errors import StoreError
from common.seeds import digest_of
from common.store import read_state_and_header, write_state_file


class Feedback:
    """A file a device, which outlasts its process; that it is lost costs only accuracy.

    Two rounds are kept: a round that is played again, because too few answered or the server
    went down, begins with what the first try began with, and gives the same bytes.

    Parameters
    ----------
    folder : Path
        Where the files are; simulated devices may share it.
    durable : bool
        See `common.store.write_bytes`.
    """

    def __init__(self, folder: Path, *, durable: bool = True) -> None:
        self._folder = folder
        self._durable = durable

    def get(self, device: str, phase: str, number: int, size: int) -> np.ndarray:
        """Return what is still owed when round `number` of a phase begins, float32 [size]."""
        rounds = {n: left for n, left in self._read(device, phase).items() if n < number}
        if not rounds:
            return np.zeros(size, np.float32)
        return decode(rounds[max(rounds)].numpy().tobytes(), no_rows(size), "fp16")

    def put(self, device: str, phase: str, number: int, left: np.ndarray) -> None:
        """Keep what round `number` of a phase took; other phases' are removed."""
        before = {n: kept for n, kept in self._read(device, phase).items() if n < number}
        kept = {n: before[n] for n in sorted(before)[-1:]}
        data = encode(left, no_rows(len(left)), "fp16")
        kept[number] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        tensors = {str(n): tensor for n, tensor in kept.items()}
        write_state_file(self._path(device), tensors, self._durable, phase=phase)

    def _read(self, device: str, phase: str) -> dict[int, torch.Tensor]:
        try:
            tensors, header = read_state_and_header(self._path(device))
        except StoreError:
            return {}
        if header.get("phase") != phase:
            return {}
        return {int(number): tensor for number, tensor in tensors.items()}

    def _path(self, device: str) -> Path:
        return self._folder / f"{digest_of(device)[:32]}.safetensors"
