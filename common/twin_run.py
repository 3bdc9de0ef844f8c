"""Run a twin's operations, one after the other, on pairs of kept and freed channels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from common.twin_ops import Halves


@dataclass(frozen=True)
class Ref:
    """An earlier value, by its number, among the arguments of an operation."""

    number: int


@dataclass(frozen=True)
class Op:
    """Computes value `number`; afterwards the values `done` are needed no more.

    `run` gets the arguments that the net's own function would, with `Halves` for tensors.
    """

    number: int
    run: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    done: tuple[int, ...]


def evaluate(ops: list[Op], value: Halves, number: int = 0) -> Halves:
    """Run operations that need no earlier value than `number`; return the last one."""
    values: dict[int, Any] = {number: value}
    for op in ops:
        args, kwargs = filled(op.args, values), filled(op.kwargs, values)
        result = values[op.number] = op.run(*args, **kwargs)
        for done in op.done:
            del values[done]
    assert isinstance(result, Halves)
    return result


def filled(argument: Any, values: dict[int, Any]) -> Any:
    """Return an argument with the values in the place of its references."""
    if isinstance(argument, Ref):
        return values[argument.number]
    if isinstance(argument, tuple | list):
        return type(argument)(filled(item, values) for item in argument)
    if isinstance(argument, dict):
        return {key: filled(item, values) for key, item in argument.items()}
    return argument


def on_halves(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make a function of tensors one of pairs, which it does to both halves alike."""

    def run(*args: Any, **kwargs: Any) -> Any:
        pairs = [a for a in (*args, *kwargs.values()) if isinstance(a, Halves)]
        if not pairs:
            return function(*args, **kwargs)
        kept, freed = (
            function(*(_half(a, i) for a in args), **{k: _half(a, i) for k, a in kwargs.items()})
            if all(pair[i] is not None for pair in pairs)
            else None
            for i in (0, 1)
        )
        return Halves(kept, freed)

    return run


def _half(argument: Any, which: int) -> Any:
    return argument[which] if isinstance(argument, Halves) else argument


def cat(values: tuple[Halves, ...], *_: Any, **__: Any) -> Halves:
    """Join channels, as ``torch.cat`` does."""
    kept, freed = (
        [half for half in side if half is not None] for side in zip(*values, strict=True)
    )
    return Halves(torch.cat(kept, 1) if kept else None, torch.cat(freed, 1) if freed else None)
