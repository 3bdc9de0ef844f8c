"""Several locations as one source: the worlds of a stream, each made of one or more of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from common.data.dataset import IntArray, Pixels, Source, TextArray
from common.data.holdout import aside_mask
from common.data.location import TEST
from common.data.places import Place, places_of
from common.data.readers import has_split, open_source
from common.errors import DataError


@dataclass(frozen=True, eq=False)
class Piece:
    """Some rows of a source, with labels that refer to other classes than the source's."""

    source: Source
    rows: IntArray
    labels: IntArray

    def where(self, chosen: np.ndarray) -> Piece:
        """Return those rows that `chosen` (bool [N]) picks."""
        return Piece(self.source, self.rows[chosen], self.labels[chosen])


class JoinedSource(Source):
    """The rows of several pieces, one piece after the other."""

    def __init__(
        self, pieces: Sequence[Piece], classes: tuple[str, ...], shape: tuple[int, int, int]
    ) -> None:
        self._pieces = pieces
        self._edges = np.cumsum([0, *(len(piece.rows) for piece in pieces)])
        columns = pieces[0].source.columns
        super().__init__(
            " + ".join(dict.fromkeys(piece.source.name for piece in pieces)),
            np.concatenate([piece.labels for piece in pieces]),
            classes,
            shape,
            tuple(c for c in columns if all(c in piece.source.columns for piece in pieces)),
        )

    def _decode(self, index: IntArray) -> Pixels:
        channels, height, width = self.shape
        images = np.empty((len(index), height, width, channels), dtype=np.uint8)
        owner = np.searchsorted(self._edges, index, side="right") - 1
        for number in np.unique(owner):
            mine, piece = owner == number, self._pieces[number]
            rows = piece.rows[index[mine] - self._edges[number]]
            images[mine] = piece.source.take(rows).images
        return images

    def _column(self, name: str) -> TextArray:
        return np.concatenate([p.source.column(name)[p.rows] for p in self._pieces])


class Worlds:
    """What the setting `data` names, opened.

    One world is taken with all its classes. Of several worlds only the classes are taken that
    all of them have, and their images are brought to the size of the first one's; they are in
    colour if any is.

    Parameters
    ----------
    data : str
        See `common.data.places`.
    size, channels : int, optional
        As of `open_source`.
    validate : float
        Share of every world's training images that takes the place of its test images; 0 is none.

    Attributes
    ----------
    names : tuple of str
        Of the worlds; no name occurs twice.
    source : Source
        The training images of all worlds, one after the other.
    edges : tuple of int
        World w has the rows from ``edges[w]`` to ``edges[w + 1]``.

    Raises
    ------
    ConfigError, DataError
        If the setting is malformed, or the data cannot be read or does not go together.
    """

    def __init__(
        self,
        data: str,
        *,
        size: int | None = None,
        channels: int | None = None,
        validate: float = 0.0,
    ) -> None:
        self._validated = validate > 0
        self._places = places_of(data)
        self.names = _distinct([place.name for place in self._places])
        opened = [
            [open_source(path, size=size, channels=channels) for path in place.locations]
            for place in self._places
        ]
        sources = [source for world in opened for source in world]
        self._alone = len(sources) == 1
        self._shape = _common_shape(sources)
        if any(source.shape != self._shape for source in sources):
            opened = [[self._open(path) for path in p.locations] for p in self._places]
        for place, world in zip(self._places, opened, strict=True):
            _check_values(place, world)
        self._classes = self._classes_of(opened)
        train, self._aside = [], []
        for place, world in zip(self._places, opened, strict=True):
            pieces = self._pieces(place, world)
            pieces, aside = _split(pieces, place.test if isinstance(place.test, float) else 0.0)
            if validate:
                pieces, aside = _split(pieces, validate)
            train.append(pieces)
            self._aside.append(aside)
        self.edges = tuple(
            int(n) for n in np.cumsum([0, *(sum(len(p.rows) for p in w) for w in train)])
        )
        self.source: Source = opened[0][0]
        if len(self.source) != self.edges[-1] or not self._alone:
            self.source = JoinedSource([p for w in train for p in w], self._classes, self._shape)

    def test(self, world: int) -> Source | None:
        """Return the test images of a world, or None if it has none."""
        place = self._places[world]
        if isinstance(place.test, float) or self._validated:
            return JoinedSource(self._aside[world], self._classes, self._shape)
        tested = place.test or place
        splits = {path: TEST if has_split(path, TEST) else None for path in tested.locations}
        if place.test is None and None in splits.values():
            return None
        classes = self._classes if len(self._places) == 1 else None
        opened = [self._open(path, split, classes) for path, split in splits.items()]
        _check_values(tested, opened)
        if self._alone and not tested.column and len(opened) == 1:
            return opened[0]
        return JoinedSource(self._pieces(tested, opened), self._classes, self._shape)

    def _open(
        self, path: str, split: str | None = None, classes: tuple[str, ...] | None = None
    ) -> Source:
        channels, height, width = self._shape
        size = height if height == width else None  # a size makes them square
        source = open_source(path, split=split, classes=classes, size=size, channels=channels)
        if source.shape != self._shape:
            raise DataError(
                f"{path}: {source.shape[2]}x{source.shape[1]} pixels, other data has "
                f"{width}x{height}; set the image size to bring all to one"
            )
        return source

    def _classes_of(self, opened: list[list[Source]]) -> tuple[str, ...]:
        named = [[name for source in world for name in source.classes] for world in opened]
        if len(opened) == 1:
            return tuple(dict.fromkeys(named[0]))
        common = set(named[0])
        for place, world in zip(self._places, opened, strict=True):
            common &= {
                source.classes[label]
                for source in world
                for label in np.unique(source.labels[_chosen(place, source)])
            }
        if len(common) < 2:
            raise DataError(
                f"data: the worlds {', '.join(self.names)} have {len(common)} class(es) in common; "
                "give worlds whose classes have the same names"
            )
        return tuple(name for name in dict.fromkeys(named[0]) if name in common)

    def _pieces(self, place: Place, sources: Sequence[Source]) -> list[Piece]:
        """Return the rows of the place that have one of our classes."""
        position = {name: number for number, name in enumerate(self._classes)}
        pieces = []
        for source in sources:
            to_ours = np.array([position.get(name, -1) for name in source.classes], np.int64)
            rows = np.flatnonzero(_chosen(place, source))
            labels = to_ours[source.labels[rows]]
            pieces.append(Piece(source, rows, labels).where(labels >= 0))
        if not any(len(piece.rows) for piece in pieces):
            raise DataError(
                f"{' + '.join(place.locations)}: no image of the classes "
                f"{', '.join(self._classes[:10])} is left; give data that has some"
            )
        return pieces


def _split(pieces: Sequence[Piece], share: float) -> tuple[list[Piece], list[Piece]]:
    """Return the pieces without a share of each class, and that share."""
    masks = [
        aside_mask(piece.labels, share) if share else np.zeros(len(piece.rows), np.bool_)
        for piece in pieces
    ]
    return (
        [piece.where(~mask) for piece, mask in zip(pieces, masks, strict=True)],
        [piece.where(mask) for piece, mask in zip(pieces, masks, strict=True)],
    )


def _check_values(place: Place, sources: Sequence[Source]) -> None:
    if not place.column:
        return
    there = np.unique(np.concatenate([source.column(place.column) for source in sources]))
    for value in place.values:
        if value not in there:
            raise DataError(
                f"{' + '.join(place.locations)}: no row has {place.column} '{value}'; there are: "
                f"{', '.join(there[:20])}"
            )


def _chosen(place: Place, source: Source) -> np.ndarray:
    if not place.column:
        return np.ones(len(source), np.bool_)
    return np.isin(source.column(place.column), place.values)


def _common_shape(sources: Sequence[Source]) -> tuple[int, int, int]:
    _, height, width = sources[0].shape
    return max(source.shape[0] for source in sources), height, width


def _distinct(names: Sequence[str]) -> tuple[str, ...]:
    """Return the names; one that occurs again is given a number."""
    return tuple(
        f"{name} ({again + 1})" if (again := names[:i].count(name)) else name
        for i, name in enumerate(names)
    )
