"""What a training step keeps in memory: measured where autograd keeps it."""

from __future__ import annotations

from types import TracebackType

import torch
from torch.autograd.graph import saved_tensors_hooks


class SavedBytes:
    """Counts, while entered, the bytes that forward passes save for their backward pass.

    These are activations and the weights that gradients need: what a training step holds at the
    end of its forward pass, in which it differs from inference. Optimizer state, gradients and a
    teacher's own forward pass, which is not kept, are left out. A storage counts once, however
    many operators save it. It is the same number on every machine and in every run, which the
    memory of a process is not.

    Attributes
    ----------
    peak : int
        Of all steps so far.
    """

    def __init__(self) -> None:
        self.peak = 0
        self._now = 0
        self._seen: set[int] = set()
        self._backward = False
        self._hooks = saved_tensors_hooks(self._pack, self._unpack)

    def __enter__(self) -> SavedBytes:
        self._hooks.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._hooks.__exit__(kind, error, trace)

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        if self._backward:  # the backward pass is over, the next step has begun
            self._now, self._backward = 0, False
            self._seen.clear()
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self._now += storage.nbytes()
            self.peak = max(self.peak, self._now)
        return tensor.detach()  # an output that its own node holds would never be freed

    def _unpack(self, tensor: torch.Tensor) -> torch.Tensor:
        self._backward = True
        return tensor
