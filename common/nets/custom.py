"""A user's own net, named as ``module:function``."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from torch import nn

from common.errors import NetError


def build(
    name: str, classes: int, in_channels: int, width: float | None, *, known: Sequence[str]
) -> nn.Module:
    """Import the module and call ``function(classes=..., in_channels=...)``.

    ``width=...`` is passed only if given, as an int if it is a whole number. Importing runs the
    module's code: the name must come from the operator, never from a message.

    Raises
    ------
    NetError
        Module not importable, function missing or failing, or its result no ``nn.Module``.
    """
    hint = f"(nets known by name: {', '.join(known)})"
    module_name, _, function_name = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # a user's module may raise anything while it is imported
        raise NetError(
            f"net {name!r}: module {module_name!r} cannot be imported: "
            f"{_line(error)}; is its folder on PYTHONPATH? {hint}"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise NetError(f"net {name!r}: {module_name} has no function {function_name!r} {hint}")
    sizes: dict[str, float] = {}
    if width is not None:
        sizes["width"] = int(width) if width == int(width) else width
    try:
        net = function(classes=classes, in_channels=in_channels, **sizes)
    except Exception as error:  # likewise
        raise NetError(f"net {name!r}: the function failed: {_line(error)} {hint}") from error
    if not isinstance(net, nn.Module):
        raise NetError(
            f"net {name!r}: the function returned {type(net).__name__}, not an nn.Module {hint}"
        )
    return net


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
