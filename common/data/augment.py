"""Random crops and flips of a whole batch at once."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from common.errors import ConfigError


@dataclass(frozen=True)
class Augment:
    """Random crop of the image padded by reflection, then a horizontal flip, each image its own.

    Parameters
    ----------
    crop_padding : int
        Pixels added on each side before the crop back to the old size; 0 is no crop. Below the
        shorter side of the images.
    flip : bool
        Mirror each image with probability 1/2. Not for images whose meaning it changes (digits).

    Raises
    ------
    ConfigError
        If the padding is negative, or too large for a batch.
    """

    crop_padding: int
    flip: bool

    def __post_init__(self) -> None:
        if self.crop_padding < 0:
            raise ConfigError(f"crop padding: {self.crop_padding}; it must be 0 or more pixels")

    def __call__(self, batch: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Augment a batch.

        Parameters
        ----------
        batch : tensor [N, C, H, W] of any type
        generator : torch Generator on the CPU

        Returns
        -------
        tensor of the same shape and type, channels_last in memory; `batch` itself if all is off
        """
        if not (self.crop_padding or self.flip):
            return batch
        count, channels, height, width = batch.shape
        if self.crop_padding >= min(height, width):
            raise ConfigError(
                f"crop padding: {self.crop_padding}; images of {width}x{height} pixels allow at "
                f"most {min(height, width) - 1}"
            )
        rows = torch.arange(height).expand(count, height)
        columns = torch.arange(width).expand(count, width)
        if self.flip:
            mirrored = torch.randint(2, (count, 1), generator=generator).bool()
            columns = torch.where(mirrored, columns.flip(1), columns)
        if self.crop_padding:
            span = (2, count, 1)
            shift = torch.randint(2 * self.crop_padding + 1, span, generator=generator)
            down, right = shift - self.crop_padding
            rows = _reflect(rows + down, height)
            columns = _reflect(columns + right, width)
        # One gather of whole pixels from the flat batch: no padded copy, no loop over images.
        image = torch.arange(count)[:, None, None] * (height * width)
        index = image + rows[:, :, None] * width + columns[:, None, :]
        pixels = batch.permute(0, 2, 3, 1).reshape(-1, channels)
        picked = pixels.index_select(0, index.flatten().to(batch.device))
        return picked.view(count, height, width, channels).permute(0, 3, 1, 2)


def _reflect(position: torch.Tensor, size: int) -> torch.Tensor:
    """Fold positions outside 0..size-1 back, the border pixel not repeated."""
    position = position.abs()
    return torch.where(position < size, position, 2 * (size - 1) - position)
