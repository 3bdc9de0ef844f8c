"""What an order names beside the base: importances, synthetic images, a rival classifier."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from client.bases import Bases
from client.wire import Arrays
from common.errors import UpdateError
from common.filters import FilterGraph
from common.layout import dense_layout
from common.order import Order
from common.state import State
from common.update import check_values, decode_scores


@dataclass(frozen=True, eq=False)
class Extras:
    """What a device holds of it.

    Attributes
    ----------
    anchor : float32 array or None
        Importances in the dense layout (see `common.anchor`).
    replay : uint8 array [N, H, W, C] or None
        Images (see `common.replay`).
    rival : float32 array or None
        See `common.features.Discriminant.pack`.
    """

    anchor: np.ndarray | None = None
    replay: np.ndarray | None = None
    rival: np.ndarray | None = None


def extras_of(
    order: Order, arrays: Arrays, graph: FilterGraph, base: State, bases: Bases
) -> Extras | None:
    """Return what `order` names, as it was sent or held; None if the device lacks any of it.

    Parameters
    ----------
    graph, base
        Of the net; they tell the dense layout.

    Raises
    ------
    UpdateError
        If what came is not what the order names.
    """
    anchor = replay = rival = None
    if order.anchor is not None:
        sent = None
        if arrays.anchor is not None:
            size = dense_layout(graph, base).size
            sent = {"anchor": _importances(order, arrays.anchor, size)}
        anchor = _held(order.anchor, sent, bases)
        if anchor is None:
            return None
    if order.replay is not None:
        sent = None if arrays.replay is None else {"replay": _images(order, arrays.replay)}
        replay = _held(order.replay, sent, bases)
        if replay is None:
            return None
    if order.rival is not None:
        sent = None if arrays.rival is None else {"rival": _classifier(arrays.rival)}
        rival = _held(order.rival, sent, bases)
        if rival is None:
            return None
    return Extras(
        None if anchor is None else anchor["anchor"].numpy(),
        None if replay is None else replay["replay"].numpy(),
        None if rival is None else rival["rival"].numpy(),
    )


def _held(digest: str, sent: State | None, bases: Bases) -> State | None:
    if sent is None:
        return bases.get(digest)
    (name,) = sent
    if bases.put(sent) != digest:
        raise UpdateError(f"the {name} array that was sent is not {digest[:12]}")
    return sent


def _importances(order: Order, array: np.ndarray, size: int) -> torch.Tensor:
    if order.codec_down == "fp32":
        return torch.from_numpy(check_values(array, size, "the importances").copy())
    return torch.from_numpy(decode_scores(array, size))


def _classifier(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(check_values(array, array.size, "the rival classifier").copy())


def _images(order: Order, array: np.ndarray) -> torch.Tensor:
    channels, height, width = order.net.input_shape
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[1:] != (height, width, channels):
        raise UpdateError(
            f"the synthetic images are {array.dtype}{list(array.shape)}, expected "
            f"uint8[N, {height}, {width}, {channels}]"
        )
    return torch.from_numpy(array.copy())  # a view of the message cannot be written
