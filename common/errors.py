"""The errors that fallow raises for people, each with a documented exit code.

::

    FallowError            1   anything below that has no code of its own
    ├── ConfigError        2   a setting is wrong (also: unknown option, as in every CLI)
    ├── DataError          3   data that cannot be read or used
    ├── NetError           4   a net that cannot be built or freed
    ├── StoreError         5   a bundle or checkpoint that is torn, foreign or of another run
    ├── RoundError         6   too few devices answered, again and again
    ├── DiskError          7   the disk is full or not writable
    ├── ExportError        8   the exported model differs from the trained one
    └── UpdateError        9   an update that is malformed or belongs to another model

The command lines print ``error: <message>`` in one line and end with the code.
"""

from __future__ import annotations

from typing import ClassVar


class FallowError(Exception):
    """Base of all errors that are told to people in one line.

    The message names the field or file, its value, and what to do.
    """

    exit_code: ClassVar[int] = 1


class ConfigError(FallowError):
    """A setting has a value that cannot be used."""

    exit_code = 2


class DataError(FallowError):
    """Data that cannot be read, or that does not fit the model."""

    exit_code = 3


class NetError(FallowError):
    """A net that cannot be built, or whose filters cannot be freed."""

    exit_code = 4


class StoreError(FallowError):
    """A bundle or checkpoint that is torn, foreign or of another run."""

    exit_code = 5


class RoundError(FallowError):
    """A round was abandoned too often because too few devices answered."""

    exit_code = 6


class DiskError(FallowError):
    """The disk is full or cannot be written to."""

    exit_code = 7


class ExportError(FallowError):
    """An exported model does not compute what the trained one does."""

    exit_code = 8


class UpdateError(FallowError):
    """An update that is malformed or belongs to another model."""

    exit_code = 9
