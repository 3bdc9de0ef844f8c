"""Image folders: ``class/*.png``, or ``train/class/*.png`` and ``test/class/*.png``.

Class names are the sorted names of the class folders; files are sorted by their path.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from common.data.dataset import IntArray, Pixels, Source, reason
from common.data.decode import Form, read_image
from common.data.labels import resolve
from common.data.location import TRAIN, Location, split_names
from common.data.options import ReadOptions
from common.errors import DataError

_SUFFIXES = frozenset(
    (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
)


def locate(path: Path) -> Location | None:
    """Return the image folder at ``path``, or None if no image is in it."""
    if not path.is_dir() or not any(is_image(file, path) for file in path.rglob("*")):
        return None
    names = split_names(folder.name for folder in path.iterdir() if folder.is_dir())
    folders = {split: path / name for split, name in names.items()} or {TRAIN: path}
    return Location(tuple(folders), lambda split, options: _open(folders, split, options))


def is_image(file: Path, root: Path) -> bool:
    """Return whether `file`, somewhere below `root`, is taken for an image."""
    hidden = any(part.startswith(".") for part in file.relative_to(root).parts)
    return not hidden and file.suffix.lower() in _SUFFIXES and file.is_file()


def _images(folder: Path) -> list[Path]:
    found = [file for file in folder.rglob("*") if is_image(file, folder)]
    if not found:
        raise DataError(f"{folder}: no images; give a folder that has some")
    return sorted(found, key=lambda file: file.relative_to(folder).as_posix())


def _class_of(file: Path, root: Path) -> str:
    parts = file.relative_to(root).parts
    if len(parts) == 1:
        raise DataError(f"{file}: lies in no class folder; move it into one")
    return parts[0]


def _open(folders: dict[str, Path], split: str, options: ReadOptions) -> Source:
    root = folders[split]
    files = _images(root)
    if not options.labelled:
        return FolderSource(root, files, np.zeros(len(files), dtype=np.int64), None, options)
    of_file = [_class_of(file, root) for file in files]
    names = tuple(sorted(set(of_file)))
    if options.classes is None and split != TRAIN and TRAIN in folders:
        # Else a class without test images would shift the labels of those after it.
        train = folders[TRAIN]
        trained = {_class_of(file, train) for file in _images(train)}
        options = replace(options, classes=tuple(sorted(trained)))
    position = {name: i for i, name in enumerate(names)}
    labels = np.array([position[name] for name in of_file], dtype=np.int64)
    return FolderSource(root, files, labels, names, options)


class FolderSource(Source):
    """Images in files of their own."""

    def __init__(
        self,
        root: Path,
        files: list[Path],
        labels: IntArray,
        names: tuple[str, ...] | None,
        options: ReadOptions,
    ) -> None:
        labels, classes = resolve(labels, names, options, lambda i: str(files[i]))
        data = _content(files[0])
        first = read_image(data, str(files[0]), size=options.size, channels=options.channels)
        self._files = files
        self._form = Form(first, options)
        super().__init__(str(root), labels, classes, self._form.shape)

    def _decode(self, index: IntArray) -> Pixels:
        def chosen() -> Iterator[tuple[bytes, str]]:
            for i in index:
                yield _content(self._files[i]), str(self._files[i])

        return self._form.decode(len(index), chosen())


def _content(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise DataError(f"{file}: unreadable ({reason(error)}); make it readable") from error
