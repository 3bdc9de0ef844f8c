"""A round's updates as they came: in memory while they are few, then in a file without a name."""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from common.store import disk_errors

_IN_MEMORY = 64 * 2**20


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
        where = None if folder is None else str(folder)
        self._file = tempfile.SpooledTemporaryFile(_IN_MEMORY, dir=where)  # noqa: SIM115
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
        self._file.close()

    def put(self, name: str, array: np.ndarray) -> None:
        """Keep an array.

        Raises
        ------
        DiskError
            If the disk is full.
        """
        with disk_errors(self._folder or Path(tempfile.gettempdir())):
            self._file.seek(self._end)
            self._file.write(np.ascontiguousarray(array).tobytes())
        self._places[name] = (self._end, array.dtype, array.shape)
        self._end += array.nbytes

    def get(self, name: str) -> np.ndarray:
        """Return the array called `name`."""
        start, dtype, shape = self._places[name]
        self._file.seek(start)
        data = self._file.read(int(np.prod(shape)) * dtype.itemsize)
        return np.frombuffer(data, dtype).reshape(shape)
