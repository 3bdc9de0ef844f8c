"""Where a net is trained: CPU or CUDA, with or without automatic mixed precision."""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass

import torch

from common.errors import ConfigError


@dataclass(frozen=True)
class Accelerator:
    """A torch device, whether its forward passes run in bfloat16, and how a twin uses its memory.

    bfloat16 needs no loss scaling, so the training loop is the same with and without. `lean` and
    `cache_mib` are those of the settings (see `common.twin`).
    """

    device: torch.device
    amp: bool = False
    lean: bool = False
    cache_mib: int = 0

    @classmethod
    def pick(
        cls, name: str = "auto", amp: bool = False, *, lean: bool = False, cache_mib: int = 0
    ) -> Accelerator:
        """Return the accelerator called `name`: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.

        Raises
        ------
        ConfigError
            If the name is unknown or the device is not there.
        """
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if name == "auto":
            name = "cuda" if count else "cpu"
        if not re.fullmatch(r"cpu|cuda(:[0-9]+)?", name):
            raise ConfigError(f"accelerator is '{name}': use auto, cpu, cuda or cuda:N")
        device = torch.device(name)
        if device.type == "cuda" and (device.index or 0) >= count:
            raise ConfigError(
                f"accelerator is '{name}', but torch sees {count or 'no'} CUDA device(s): use "
                f"{'a lower number' if count else 'cpu'}"
            )
        return cls(device, amp, lean, cache_mib)

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """Return the context in which forward passes run."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp)


CPU = Accelerator(torch.device("cpu"))
