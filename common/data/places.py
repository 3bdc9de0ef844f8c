"""What the setting `data` says: which worlds there are and where their images lie.

``A,B,C`` are three worlds: the prior's, and one for every step. A world is

- a location (see `common.data.readers.open_source`), or several joined by ``+``;
- of these, with ``@COLUMN=VALUE+VALUE``, only the rows that have one of the values;
- with ``|TEST``, tested on the images of another such place; with ``|20%``, on a share of its
  own images, which is set aside; by default on its own test split.

Whatever exists as a path just as it is written is that path.

>>> [place.name for place in places_of("emoji@vendor=openmoji,emoji@vendor=twemoji+emojione")]
['openmoji', 'twemoji+emojione']
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from common.data import digits
from common.errors import ConfigError


@dataclass(frozen=True)
class Place:
    """Where the images of a world lie.

    Attributes
    ----------
    column, values : str, tuple of str
        Only rows with one of the values in this column; all rows without a column.
    test : Place, float or None
        Where its test images lie; a share of its own images; or its own test split.
    """

    locations: tuple[str, ...]
    column: str = ""
    values: tuple[str, ...] = ()
    test: Place | float | None = None

    @property
    def name(self) -> str:
        """What tells this world from others."""
        return "+".join(self.values or [Path(path).name for path in self.locations])

    @property
    def label(self) -> str:
        """All that it says, but for the folders that the locations lie in."""
        text = "+".join(Path(path).name for path in self.locations)
        text += f"@{self.column}={'+'.join(self.values)}" if self.column else ""
        if isinstance(self.test, float):
            return f"{text}|{100 * self.test:g}%"
        return text if self.test is None else f"{text}|{self.test.label}"


def places_of(data: str) -> tuple[Place, ...]:
    """Return the worlds that the setting `data` names, the prior's first.

    Raises
    ------
    ConfigError
        If it is malformed. Whether the locations exist is seen when they are opened.
    """
    if _is_path(data):
        return (Place((data,)),)
    return tuple(_place(text) for text in data.split(","))


def label_of(data: str) -> str:
    """Return the setting `data` without the folders in which the locations lie."""
    return ",".join(place.label for place in places_of(data))


def _place(text: str) -> Place:
    if _is_path(text):
        return Place((text,))
    text, bar, test = text.rpartition("|") if "|" in text else (text, "", "")
    place = _rows(text)
    return replace(place, test=_test(test)) if bar else place


def _test(text: str) -> Place | float:
    if not text.endswith("%"):
        return _rows(text)
    try:
        share = float(text[:-1]) / 100
    except ValueError:
        share = 0.0
    if not 0 < share < 1:
        raise ConfigError(f"data sets '{text}' aside for testing: give 1% to 99%")
    return share


def _rows(text: str) -> Place:
    if _is_path(text) or "@" not in text:
        return Place(_locations(text))
    where, _, rows = text.rpartition("@")
    column, equals, values = rows.partition("=")
    if not (column and equals and values):
        raise ConfigError(f"data has '{text}': write PATH@COLUMN=VALUE or PATH@COLUMN=VALUE+VALUE")
    return Place(_locations(where), column, tuple(values.split("+")))


def _locations(text: str) -> tuple[str, ...]:
    if not text:
        raise ConfigError("data has an empty place: write PATH, PATH+PATH or PATH,PATH")
    return (text,) if _is_path(text) else tuple(text.split("+"))


def _is_path(text: str) -> bool:
    return text == digits.NAME or (bool(text) and Path(text).exists())
