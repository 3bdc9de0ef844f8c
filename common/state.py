"""The weights of a net as plain tensors: read, written, named by their digest."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import nn

from common.errors import NetError

State = dict[str, torch.Tensor]


def read_state(net: nn.Module) -> State:
    """Return copies of all floating-point weights and buffers of `net`, on the CPU.

    ``num_batches_tracked`` is left out: with a fixed BN momentum it changes nothing, and a
    counter would make equal models differ.
    """
    return {
        name: tensor.detach().to("cpu", torch.float32, copy=True).contiguous()
        for name, tensor in net.state_dict().items()
        if tensor.is_floating_point()
    }


def write_state(net: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Copy `state` into `net`, in place.

    Raises
    ------
    NetError
        If a tensor is missing, unknown or of another shape.
    """
    own = {k: v for k, v in net.state_dict().items() if v.is_floating_point()}
    for name in sorted(own.keys() ^ state.keys()):
        side = "lacks" if name in own else "has an unknown"
        raise NetError(f"the state {side} tensor '{name}': it belongs to another net")
    with torch.no_grad():
        for name, tensor in own.items():
            if tensor.shape != state[name].shape:
                raise NetError(
                    f"tensor '{name}' has shape {tuple(state[name].shape)}, the net expects "
                    f"{tuple(tensor.shape)}: check net, width and classes"
                )
            tensor.copy_(state[name])


def state_digest(state: Mapping[str, torch.Tensor]) -> str:
    """Return the SHA-256 (hex) of names, shapes and bytes of `state`."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name]
        digest.update(f"{name}|{tuple(tensor.shape)}|{tensor.dtype}|".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
