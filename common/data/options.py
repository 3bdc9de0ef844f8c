"""How a source is to be read: sizes, channels, classes."""

from __future__ import annotations

from dataclasses import dataclass

from common.errors import ConfigError


@dataclass(frozen=True)
class ReadOptions:
    """What the caller asks of a source.

    Parameters
    ----------
    classes : tuple of str, optional
        The class names that labels must refer to; by default the source's own.
    size : int, optional
        Side of the square that every image is resized and cropped to, in pixels.
    channels : int, optional
        1 (grey) or 3 (RGB); by default those of the first image.
    labelled : bool
        If false, labels are neither needed nor read.
    """

    classes: tuple[str, ...] | None = None
    size: int | None = None
    channels: int | None = None
    labelled: bool = True

    def __post_init__(self) -> None:
        if self.size is not None and self.size < 1:
            raise ConfigError(f"size: {self.size}; it must be at least 1 pixel")
        if self.channels not in (None, 1, 3):
            raise ConfigError(f"channels: {self.channels}; it must be 1 (grey) or 3 (colour)")
        if self.classes is not None and len(set(self.classes)) != len(self.classes):
            raise ConfigError(f"classes: {', '.join(self.classes)}; a name occurs twice")
