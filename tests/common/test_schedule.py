"""Scopes that change within a step."""

from __future__ import annotations

import pytest

from common.config import Config
from common.errors import ConfigError
from common.schedule import schedule_of, scope_at


@pytest.mark.parametrize(
    ("text", "rounds", "scopes"),
    [
        ("group:6,all:6", 12, ["group"] * 6 + ["all"] * 6),
        ("group:6,all:6", 4, ["group"] * 2 + ["all"] * 2),
        ("rows:1,group:1,all:2", 8, ["rows"] * 2 + ["group"] * 2 + ["all"] * 4),
        ("group:3,all:1", 1, ["group"]),
        ("all:1", 3, ["all"] * 3),
        ("rows:0.25,all:0.75", 4, ["rows"] + ["all"] * 3),
    ],
)
def test_rounds_are_dealt_out_in_proportion(text: str, rounds: int, scopes: list[str]) -> None:
    schedule = schedule_of(text)
    assert [scope_at(schedule, number, rounds) for number in range(rounds)] == scopes
    assert scope_at(schedule, rounds, rounds) == text.rpartition(",")[2].partition(":")[0]


@pytest.mark.parametrize(
    "text",
    ["group", "group:", "group:0", "group:-1", "kept:3", "all:6,group:6", "all:1,all:1", ","],
)
def test_a_malformed_schedule_is_told(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^scope-schedule: "):
        Config.parse({"scope-schedule": text})


def test_without_a_schedule_the_scope_stays() -> None:
    assert Config().scopes == ("group",)
    assert {Config(rounds=5).scope_in(number) for number in range(6)} == {"group"}
