"""Which scope a round of growing has, where it changes within a step.

``group:6,all:6`` is six rounds of scope ``group``, then six of ``all``; if the step has another
number of rounds, they are dealt out in this proportion. Scopes only widen: what was trained in a
round can then be packed in every later one.
"""

from __future__ import annotations

from typing import Literal, get_args

Scope = Literal["rows", "group", "all"]
SCOPES: tuple[Scope, ...] = get_args(Scope)


def schedule_of(text: str) -> tuple[tuple[Scope, float], ...]:
    """Return (scope, rounds) in turn; ValueError if `text` is malformed.

    >>> schedule_of("group:6,all:6")
    (('group', 6.0), ('all', 6.0))
    """
    known: dict[str, Scope] = {scope: scope for scope in SCOPES}
    parts: list[tuple[Scope, float]] = []
    for part in text.split(","):
        name, _, number = part.partition(":")
        rounds = float(number) if number.replace(".", "", 1).isdecimal() else 0.0
        if name not in known or rounds <= 0:
            raise ValueError(f"'{part}' is no scope with a number of rounds: write group:6,all:6")
        parts.append((known[name], rounds))
    order = [SCOPES.index(scope) for scope, _ in parts]
    if sorted(set(order)) != order:
        raise ValueError("scopes may only widen, from rows to group to all, each once")
    return tuple(parts)


def scope_at(schedule: tuple[tuple[Scope, float], ...], number: int, rounds: int) -> Scope:
    """Return the scope of round `number` (from 0) of so many; past the end, the last one."""
    total, until = sum(share for _, share in schedule), 0.0
    for scope, share in schedule:
        until += share
        if number < round(until / total * rounds):
            return scope
    return schedule[-1][0]
