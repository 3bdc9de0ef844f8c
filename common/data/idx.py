"""IDX files as of MNIST: ``train-images-idx3-ubyte`` with ``train-labels-idx1-ubyte``.

Either may end in ``.gz``; the test split is called ``t10k`` or ``test``. The format: two zero
bytes, the type (8 = unsigned byte), the number of dimensions, each dimension as a big-endian
32-bit number, then the data (http://yann.lecun.com/exdb/mnist).
"""

from __future__ import annotations

import gzip
import math
import re
import zlib
from pathlib import Path

import numpy as np

from common.data.arrays import ArraySource
from common.data.dataset import IntArray, Pixels, Source, reason
from common.data.location import TRAIN, Location, split_names
from common.data.options import ReadOptions
from common.errors import DataError

_IMAGES = re.compile(r"(.*?)-?images[-.]idx3-ubyte(\.gz)?")

# Deflate cannot pack more tightly: a header that promises more is wrong.
_MOST_PACKED = 1032


def locate(path: Path) -> Location | None:
    """Return the IDX data at ``path``, a folder or a file of images, or None if there is none."""
    if path.is_file():
        files = {TRAIN: path} if _IMAGES.fullmatch(path.name) else {}
    else:
        named = {
            match[1]: f for f in sorted(path.iterdir()) if (match := _IMAGES.fullmatch(f.name))
        }
        files = {split: named[name] for split, name in split_names(named).items()}
    if not files:
        return None
    return Location(tuple(files), lambda split, options: _open(files, split, options))


def _open(files: dict[str, Path], split: str, options: ReadOptions) -> Source:
    path = files[split]
    images: Pixels = _read(path, dimensions=3)
    if not options.labelled:
        return ArraySource(str(path), images, None, None, options)
    others = (_labels(other) for name, other in files.items() if name != split)
    return ArraySource(str(path), images, _labels(path), None, options, others)


def _labels(images: Path) -> IntArray:
    name = images.name.removesuffix(".gz").replace("images", "labels").replace("idx3", "idx1")
    for candidate in (images.with_name(name), images.with_name(f"{name}.gz")):
        if candidate.is_file():
            return _read(candidate, dimensions=1).astype(np.int64)
    raise DataError(f"{images}: no labels beside it; put {name} there")


def _read(path: Path, dimensions: int) -> Pixels:
    header = 4 + 4 * dimensions
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            head = file.read(header)
            if len(head) < header:
                raise DataError(f"{path}: truncated, {len(head)} bytes; replace it")
            if head[:4] != bytes((0, 0, 8, dimensions)):
                raise DataError(
                    f"{path}: wrong magic number {head[:4].hex()}, "
                    f"{bytes((0, 0, 8, dimensions)).hex()} is expected; is this an IDX file?"
                )
            shape = tuple(int(n) for n in np.frombuffer(head, dtype=">u4", offset=4))
            size = math.prod(shape)
            possible = size <= path.stat().st_size * _MOST_PACKED
            data = file.read(size + 1) if possible else b""
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: unreadable ({reason(error)}); replace it") from error
    if len(data) != size:
        what = "truncated" if len(data) < size else "longer than its header says"
        raise DataError(f"{path}: {what} ({' x '.join(map(str, shape))} expected); replace it")
    return np.frombuffer(data, dtype=np.uint8).reshape(shape)
