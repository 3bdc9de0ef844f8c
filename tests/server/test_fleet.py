"""Who is there: names, doubles, newcomers, those who rest, replies that come too late."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import pytest
from fake_grid import FakeGrid, reply_to
from flwr.app import Error, Message, RecordDict

from common.errors import RoundError
from common.order import Report
from server import fleet as module
from server.fleet import Fleet, zip_replies
from server.inline import _identify
from server.ledger import Ledger


def named(name: str) -> Callable[[Message], Message]:
    return lambda message: reply_to(message, Report(device=name))


def grid_of(*names: str) -> FakeGrid:
    return FakeGrid({100 + i: named(name) for i, name in enumerate(names)})


def test_two_nodes_with_one_name_are_told_apart_at_once_and_not_waited_for() -> None:
    grid, told = grid_of("a", "b", "b"), []
    began = time.monotonic()
    with pytest.raises(RoundError, match=r"2 of 3 devices: nodes 101 and 102 both call them.* 'b'"):
        Fleet(grid).wait_for(3, 60.0, told.append)
    assert time.monotonic() - began < 20
    assert any("nodes 101 and 102 both call themselves 'b'" in text for text in told)


def test_of_two_nodes_with_one_name_one_is_used_where_there_are_enough() -> None:
    grid, told = grid_of("a", "b", "b"), []
    fleet = Fleet(grid)
    fleet.wait_for(2, 10.0, told.append)
    assert fleet.present() == {"a": 100, "b": 101}
    assert len(told) == 1
    fleet.wait_for(2, 10.0, told.append)
    assert len(told) == 1  # once is enough
    del grid.nodes[101]  # the first leaves: the other takes its place
    fleet.wait_for(2, 10.0)
    assert fleet.present() == {"a": 100, "b": 102}


def test_a_device_that_came_back_replaces_its_dead_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_STILL_THERE_SECONDS", 0.05)
    grid = grid_of("a")
    fleet = Fleet(grid)
    fleet.wait_for(1, 10.0)
    grid.nodes[7] = named("a")
    grid.nodes[100] = lambda message: None  # still listed, long gone
    fleet.wait_for(1, 10.0)
    assert fleet.present() == {"a": 7}


def test_a_node_that_declines_to_say_its_name_is_told_of() -> None:
    grid, told = grid_of("a"), []
    grid.nodes[5] = lambda m: reply_to(m, Report(device="", declined="no 'partition-id'"))
    fleet = Fleet(grid)
    fleet.wait_for(1, 10.0, told.append)
    fleet.wait_for(1, 10.0, told.append)
    assert told == ["node 5 gave no name: no 'partition-id'"]
    with pytest.raises(RoundError, match=r"1 of 2 .* \(one said: no 'partition-id'\)"):
        fleet.wait_for(2, 0.05, told.append)


@pytest.mark.parametrize("name", ["", "x" * 5000, "two\nlines"])
def test_a_name_that_nobody_can_read_is_no_name(name: str) -> None:
    told: list[str] = []
    with pytest.raises(RoundError, match="printable"):
        Fleet(grid_of(name)).wait_for(1, 0.05, told.append)
    assert all(len(text) < 300 and "\n" not in text for text in told)


def test_newcomers_are_greeted_and_not_waited_for() -> None:
    grid = grid_of("a")
    fleet = Fleet(grid)
    fleet.wait_for(1, 10.0)
    grid.nodes[5], grid.delay[5] = named("b"), 0.2
    grid.nodes[6] = lambda message: None
    began = time.monotonic()
    fleet.wait_for(1, 10.0)
    assert time.monotonic() - began < 0.15
    assert list(fleet.present()) == ["a"]
    time.sleep(0.25)
    fleet.wait_for(1, 10.0)
    assert list(fleet.present()) == ["a", "b"]


def test_a_node_that_lost_its_connection_comes_back_without_being_asked_again() -> None:
    grid = grid_of("a", "b")
    fleet = Fleet(grid)
    fleet.wait_for(2, 10.0)
    away = grid.nodes.pop(101)
    fleet.wait_for(1, 10.0)
    assert list(fleet.present()) == ["a"]
    grid.nodes[101] = away
    sent = len(grid.sent)
    fleet.wait_for(2, 10.0)
    assert list(fleet.present()) == ["a", "b"]
    assert len(grid.sent) == sent


def test_a_silent_node_costs_the_first_wait_and_no_more() -> None:
    grid = grid_of("a", "b")
    grid.nodes[5] = lambda message: None
    fleet = Fleet(grid)
    fleet.wait_for(2, 0.2)
    assert list(fleet.present()) == ["a", "b"]


def test_a_device_that_fails_again_and_again_rests_and_comes_back() -> None:
    fleet = Fleet(grid_of("a", "b", "c"))
    fleet.wait_for(3, 10.0)
    ledger = fleet.ledger
    assert [ledger.failed("b", 2, 3) for _ in range(2)] == [False, True]
    asked = []
    for number in range(5):
        ledger.exchanges += 1
        asked.append(list(fleet.sample(1.0, number)))
    assert asked == [["a", "c"]] * 3 + [["a", "b", "c"]] * 2
    assert not ledger.failed("a", 0, 3)  # rest-after 0: never
    ledger.failed("c", 2, 3)
    ledger.answered("c")
    assert not ledger.failed("c", 2, 3)  # in a row


def test_nobody_rests_if_too_few_would_be_left() -> None:
    fleet = Fleet(grid_of("a", "b", "c"))
    fleet.wait_for(3, 10.0)
    for name in ("a", "b"):
        fleet.ledger.failed(name, 1, 9)
    assert list(fleet.sample(1.0, 0, least=0.5)) == ["a", "b", "c"]
    assert list(fleet.sample(1.0, 0, least=0.3)) == ["c"]


def test_the_ledger_comes_back_as_it_was() -> None:
    ledger = Ledger()
    ledger.failed("a", 1, 4)
    ledger.counted("b", 2, 50, 9)
    ledger.of("b").last = "1.grow.0.0 12ab"
    ledger.exchanges = 3
    again = Ledger(ledger.as_json())
    assert again.as_json() == ledger.as_json()
    assert again.rests("a")
    assert (
        again.jump("b", 2, 101, 9) == "it counts 101 training images in a step in which it had 50"
    )
    assert again.jump("b", 2, 20, 9) is None  # consent was withdrawn
    assert again.jump("b", 3, 5000, 900) is None  # another step's images
    assert again.jump("new", 2, 5000, 9) is None


def test_more_are_asked_than_are_wanted() -> None:
    fleet = Fleet(grid_of(*"abcdefghij"))
    fleet.wait_for(10, 10.0)
    for share, over in ((0.5, 1.0), (0.5, 1.3), (1.0, 1.3), (0.1, 10.0)):
        asked = fleet.sample(share, 0, over=over)
        assert len(asked) == min(10, math.ceil(10 * share * over))
        assert fleet.sample(share, 0, over=over) == asked


def order_to(node: int) -> Message:
    return Message(RecordDict(), dst_node_id=node, message_type="query", group_id="x")


def test_the_same_reply_twice_is_one() -> None:
    grid = grid_of("a", "b")
    honest = grid.pull_messages
    grid.pull_messages = lambda ids: [m for m in honest(ids) for _ in range(2)]  # type: ignore
    got = list(zip_replies(grid, [order_to(100), order_to(101)], 5.0))
    assert [node for node, _ in got] == [100, 101]


def test_late_replies_are_dropped_and_told_apart_from_dead_nodes() -> None:
    grid = grid_of("a", "b", "c")
    fleet = Fleet(grid)
    grid.delay = {101: 0.1}
    grid.nodes[102] = lambda m: Message(Error(1, "gone"), reply_to=m)
    grid.delay[102] = 0.1
    got = [n for n, _ in zip_replies(grid, map(order_to, (100, 101, 102)), 0.05, late=fleet.late)]
    assert got == [100]
    assert sorted(fleet.late.values()) == [101, 102]
    time.sleep(0.1)
    assert fleet.sweep() == [101]
    assert fleet.late == {}
    assert fleet.sweep() == []


@pytest.fixture(autouse=True)
def prepared() -> None:
    _identify()
