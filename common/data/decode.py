"""Image files to arrays: the one decoder for training, devices and inference."""

from __future__ import annotations

from collections.abc import Iterable
from io import BytesIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from common.data.dataset import Pixels, reason
from common.data.options import ReadOptions
from common.errors import DataError

# Just below the size at which Pillow itself begins to warn of a decompression bomb.
MAX_PIXELS = 89_000_000

_GREY = ("1", "L", "LA", "La")


def read_image(
    data: bytes, name: str, *, size: int | None = None, channels: int | None = None
) -> Pixels:
    """Decode an image file.

    The orientation that cameras write into EXIF is applied, and what is transparent becomes
    white.

    Parameters
    ----------
    data : bytes
        The content of a file in any format that Pillow reads.
    name : str
        File, or file and row, for error messages.
    size : int, optional
        Resize the shorter side to this many pixels (bilinear) and crop the centre square.
    channels : int, optional
        1 (grey) or 3 (RGB); by default grey images have 1, all others 3.

    Returns
    -------
    uint8 array [H, W, C]

    Raises
    ------
    DataError
        If the data is no image, broken, too large, or has more than 8 bits a channel.
    """
    try:
        with Image.open(BytesIO(data)) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width}x{image.height} pixels, over {MAX_PIXELS:,}")
            ImageOps.exif_transpose(image, in_place=True)
            return fit_image(image, size=size, channels=channels)
    except UnidentifiedImageError as error:
        raise DataError(f"{name}: not an image; replace or remove it") from error
    except Exception as error:  # decoders raise almost anything on hostile bytes
        raise DataError(f"{name}: broken image ({reason(error)}); replace or remove it") from error


def fit_image(image: Image.Image, *, size: int | None, channels: int | None) -> Pixels:
    """Convert to ``channels`` and to a square of ``size``; see :func:`read_image`.

    Raises
    ------
    ValueError
        If the image has more than 8 bits a channel.
    """
    if image.mode.startswith(("I", "F")):
        # Pillow would clip these to 255 instead of scaling them.
        raise ValueError(f"mode {image.mode}, more than 8 bits a channel")
    if channels is None:
        channels = 1 if image.mode in _GREY else 3
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("L" if channels == 1 else "RGB")
    if size is not None and image.size != (size, size):
        image = _centre_square(image, size)
    pixels = np.asarray(image, dtype=np.uint8)
    return pixels.reshape(*pixels.shape[:2], channels)


def _centre_square(image: Image.Image, size: int) -> Image.Image:
    short = min(image.size)
    width, height = (max(size, round(side * size / short)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


class Form:
    """The form that all images of a source take: that of the first, unless asked otherwise.

    Parameters
    ----------
    first : uint8 array [H, W, C]
        The first image, already read with ``options``.
    options : ReadOptions
    """

    def __init__(self, first: Pixels, options: ReadOptions) -> None:
        height, width, channels = first.shape
        self.shape = (channels, height, width)
        self._size = options.size
        # Grey becomes colour without loss; the reverse only when asked for.
        self._channels = 3 if channels == 3 else options.channels

    def read(self, data: bytes, name: str) -> Pixels:
        """Decode an image file to this form; DataError names ``name`` if it does not fit."""
        pixels = read_image(data, name, size=self._size, channels=self._channels)
        height, width, channels = pixels.shape
        if (channels, height, width) == self.shape:
            return pixels
        if channels != self.shape[0]:
            raise DataError(
                f"{name}: a colour image, but the first one is grey; "
                "set channels to 1 or 3 to convert all"
            )
        raise DataError(
            f"{name}: {width}x{height} pixels, but the first image has "
            f"{self.shape[2]}x{self.shape[1]}; set the image size to bring all to one"
        )

    def decode(self, count: int, files: Iterable[tuple[bytes, str]]) -> Pixels:
        """Decode ``count`` files, given as content and name, to uint8 [count, H, W, C]."""
        channels, height, width = self.shape
        images = np.empty((count, height, width, channels), dtype=np.uint8)
        for i, (data, name) in enumerate(files):
            images[i] = self.read(data, name)
        return images
