"""A round's updates as they came: in memory while they are few, then in a file without a name."""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import numpy as np

from common.store import disk_errors

_IN_MEMORY = 256 * 2**20


class Spool:
    """Arrays by name; they take as much memory as a few of them, however many there are.

    The file has no name in its folder, so that it is gone when the process is, however it ends.

    Parameters
    ----------
    folder : Path, optional
        Where the file is, if one is needed; by default the system's folder for such files.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._held: dict[str, np.ndarray] = {}
        self._room = _IN_MEMORY
        self._file: IO[bytes] | None = None
        self._places: dict[str, tuple[int, np.dtype, tuple[int, ...]]] = {}
        self._end = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file is not None:
            self._file.close()

    def put(self, name: str, array: np.ndarray) -> None:
        """Keep an array under a new name; nobody may change it from then on.

        Raises
        ------
        DiskError
            If the disk is full.
        """
        if array.nbytes <= self._room:
            self._room -= array.nbytes
            self._held[name] = array
            return
        with disk_errors(self._folder or Path(tempfile.gettempdir())):
            if self._file is None:
                self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115
            self._file.seek(self._end)
            self._file.write(np.ascontiguousarray(array).data.cast("B"))
        self._places[name] = (self._end, array.dtype, array.shape)
        self._end += array.nbytes

    def get(self, name: str) -> np.ndarray:
        """Return the array called `name`."""
        if name in self._held:
            return self._held[name]
        assert self._file is not None
        start, dtype, shape = self._places[name]
        self._file.seek(start)
        data = self._file.read(int(np.prod(shape)) * dtype.itemsize)
        return np.frombuffer(data, dtype).reshape(shape)
