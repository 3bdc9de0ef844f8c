"""Parquet files in the Hugging Face layout: an image column struct{bytes, path} and a label.

A folder may hold ``train.parquet``, shards ``train-00000-of-00003.parquet``, the same under
``data/``, or ``train/*.parquet``; likewise for the test split. Row groups are read as needed.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from common.data.dataset import IntArray, Pixels, Source, TextArray, reason
from common.data.decode import Form, read_image
from common.data.labels import resolve
from common.data.location import TRAIN, Location, split_names
from common.data.options import ReadOptions
from common.errors import DataError

_IMAGE_COLUMNS = ("img", "image")
_LABEL_COLUMNS = ("label", "fine_label", "labels")
_SPLIT_FILE = re.compile(r"([a-z0-9]+)(?:-(\d+)-of-(\d+).*)?\.parquet")


def locate(path: Path) -> Location | None:
    """Return the Parquet data at ``path``, or None if there is none."""
    if path.is_file():
        files = {TRAIN: [path]} if path.suffix == ".parquet" else {}
    else:
        files = _split_files(path) or _split_files(path / "data") or _split_folders(path)
    if not files:
        return None
    return Location(tuple(files), lambda split, options: _open(files, split, options))


def _split_files(folder: Path) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    shards: dict[str, int] = {}
    for file in sorted(folder.glob("*.parquet")):
        if match := _SPLIT_FILE.fullmatch(file.name):
            name, _, total = match.groups()
            found.setdefault(name, []).append(file)
            shards[name] = int(total or 1)
    chosen = split_names(found)
    for name in chosen.values():
        if len(found[name]) != shards[name]:
            raise DataError(
                f"{folder}: {len(found[name])} files of the {name} split, but their names tell of "
                f"{shards[name]}; complete or remove them"
            )
    return {split: found[name] for split, name in chosen.items()}


def _split_folders(folder: Path) -> dict[str, list[Path]]:
    found = {file.parent.name for file in folder.glob("*/*.parquet")}
    return {
        split: sorted((folder / n).glob("*.parquet")) for split, n in split_names(found).items()
    }


def _open(files: dict[str, list[Path]], split: str, options: ReadOptions) -> Source:
    table = _Table(files[split])
    if not options.labelled:
        return ParquetSource(table, np.zeros(len(table), dtype=np.int64), None, options)
    others = (_Table(other).labels() for name, other in files.items() if name != split)
    return ParquetSource(table, table.labels(), table.class_names(), options, others)


class ParquetSource(Source):
    """Images in Parquet files; only the row groups and rows that are taken are decoded."""

    def __init__(
        self,
        table: _Table,
        labels: IntArray,
        names: tuple[str, ...] | None,
        options: ReadOptions,
        others: Iterable[IntArray] = (),
    ) -> None:
        labels, classes = resolve(labels, names, options, table.where, others=others)
        self._table = table
        [(data, name)] = table.images(np.array([0]))
        first = read_image(data, name, size=options.size, channels=options.channels)
        self._form = Form(first, options)
        super().__init__(table.name, labels, classes, self._form.shape, table.text_columns())

    def _decode(self, index: IntArray) -> Pixels:
        return self._form.decode(len(index), self._table.images(index))

    def _column(self, name: str) -> TextArray:
        values = self._table.column(name)
        missing = np.flatnonzero(values.is_null())
        if missing.size:
            raise DataError(
                f"{self._table.where(int(missing[0]))}: no value for {name}; fill it in"
            )
        return np.array(values.cast(pa.string()).to_pylist(), dtype=np.str_)


class _Table:
    """The rows of one or more Parquet files, counted through."""

    def __init__(self, files: list[Path]) -> None:
        self.name = str(files[0] if len(files) == 1 else files[0].parent)
        self._files = files
        self._groups: list[tuple[int, int]] = []  # (file, row group in it)
        sizes: list[int] = []
        self._file_starts = [0]
        for number, path in enumerate(files):
            with _told(path), pq.ParquetFile(path) as file:
                schema, metadata = file.schema_arrow, file.metadata
                rows = [metadata.row_group(g).num_rows for g in range(metadata.num_row_groups)]
            if number == 0:
                self._schema = schema
            elif not schema.equals(self._schema):
                raise DataError(f"{path}: its columns differ from those of {files[0].name}")
            self._groups += [(number, g) for g in range(len(rows))]
            sizes += rows
            self._file_starts.append(self._file_starts[-1] + sum(rows))
        self._starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
        if not len(self):
            raise DataError(f"{self.name}: no images; give a file that has some")
        self._image = self._image_column()

    def __len__(self) -> int:
        return self._file_starts[-1]

    def where(self, row: int) -> str:
        number = bisect_right(self._file_starts, row) - 1
        return f"{self._files[number]}: row {row - self._file_starts[number]}"

    def images(self, index: IntArray) -> list[tuple[bytes, str]]:
        """Return the encoded images at ``index``, each with its place."""
        found: list[tuple[bytes, str]] = [(b"", "")] * len(index)
        groups = np.searchsorted(self._starts, index, side="right") - 1
        for group in np.unique(groups):
            number, inside = self._groups[group]
            with _told(self._files[number]), pq.ParquetFile(self._files[number]) as file:
                table = file.read_row_group(inside, columns=[f"{self._image}.bytes"])
            column = pc.struct_field(table.column(0), "bytes")
            for i in np.flatnonzero(groups == group):
                data = column[int(index[i] - self._starts[group])].as_py()
                place = self.where(int(index[i]))
                if data is None:
                    raise DataError(f"{place}: no bytes in column {self._image}; embed the image")
                found[i] = data, place
        return found

    def labels(self) -> IntArray:
        name = self._label_column()
        values = self.column(name)
        missing = np.flatnonzero(values.is_null())
        if missing.size:
            raise DataError(f"{self.where(int(missing[0]))}: no {name}; fill it in")
        return np.array(values.to_numpy(), dtype=np.int64)

    def column(self, name: str) -> Any:
        """Return a whole column as an Arrow chunked array."""
        parts = []
        for path in self._files:
            with _told(path), pq.ParquetFile(path) as file:
                parts.append(file.read(columns=[name]).column(0))
        return pa.chunked_array([chunk for part in parts for chunk in part.chunks], parts[0].type)

    def class_names(self) -> tuple[str, ...] | None:
        """Return the class names that Hugging Face's ``datasets`` writes into the schema."""
        try:
            features = json.loads(self._schema.metadata[b"huggingface"])["info"]["features"]
            names = features[self._label_column()]["names"]
        except (KeyError, TypeError, ValueError):
            return None
        return tuple(str(name) for name in names)

    def text_columns(self) -> tuple[str, ...]:
        types = pa.types
        kinds = (types.is_string, types.is_large_string, types.is_dictionary, types.is_integer)
        named = ((f.name, f.type) for f in self._schema if f.name not in _LABEL_COLUMNS)
        return tuple(name for name, kind in named if any(is_kind(kind) for is_kind in kinds))

    def _image_column(self) -> str:
        pictures = [f.name for f in self._schema if _is_picture(f.type)]
        for name in _IMAGE_COLUMNS:
            if name in pictures:
                return name
        if len(pictures) == 1:
            return str(pictures[0])
        raise DataError(
            f"{self.name}: {len(pictures)} image columns struct{{bytes, path}} among "
            f"{', '.join(self._schema.names)}; name the right one 'image'"
        )

    def _label_column(self) -> str:
        for name in _LABEL_COLUMNS:
            if name in self._schema.names:
                kind = self._schema.field(name).type
                if not pa.types.is_integer(kind):
                    raise DataError(f"{self.name}: column {name} is {kind}; integers are needed")
                return name
        raise DataError(
            f"{self.name}: no label column among {', '.join(self._schema.names)}; "
            f"name it {' or '.join(_LABEL_COLUMNS)}"
        )


def _is_picture(kind: Any) -> bool:
    return pa.types.is_struct(kind) and {"bytes", "path"} <= {field.name for field in kind}


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """Turn what Arrow raises on an unreadable file into a DataError."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: unreadable Parquet ({reason(error)}); replace it") from error
