"""What a device gives to training, and how it says no."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from client.index import Index
from client.limits import Guard, LimitError, memory_free, memory_used, own_check
from client.power import why_metered, why_not_charging
from client.settings import Limits
from common.errors import ConfigError


@pytest.fixture
def index(tmp_path: Path) -> Iterator[Index]:
    with Index.create(tmp_path / "store") as made:
        yield made


def supply(folder: Path, name: str, **files: str) -> None:
    (folder / name).mkdir()
    for key, value in files.items():
        (folder / name / key).write_text(value + "\n")


def test_a_device_without_a_battery_is_on_mains(tmp_path: Path) -> None:
    assert why_not_charging(tmp_path / "none") is None
    supply(tmp_path, "hid", type="Battery", scope="Device", status="Discharging")
    assert why_not_charging(tmp_path) is None


@pytest.mark.parametrize(
    ("status", "online", "trains"),
    [
        ("Charging", "0", True),
        ("Full", "0", True),
        ("Discharging", "1", True),
        ("Discharging", "0", False),
        ("Not charging", "0", False),
    ],
)
def test_a_device_on_battery_does_not_train(
    status: str, online: str, trains: bool, tmp_path: Path
) -> None:
    supply(tmp_path, "BAT0", type="Battery", status=status)
    supply(tmp_path, "AC", type="Mains", online=online)
    assert (why_not_charging(tmp_path) is None) == trains


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("u 2", None),
        ("u 4", None),
        ("u 1", "on a metered network"),
        ("u 3", "on a metered network"),
        ("u 0", "nothing here says"),
        ("", "nothing here says"),
    ],
)
def test_network_manager_is_asked_whether_bytes_cost(answer: str, said: str | None) -> None:
    reason = why_metered(("echo", answer))
    assert reason is None if said is None else said in str(reason)


def test_without_network_manager_a_device_says_that_it_cannot_tell() -> None:
    assert "nothing here says" in str(why_metered(("no-such-program",)))


def test_a_check_of_ones_own_is_a_command_or_a_function(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_check_for_test.py").write_text(
        "def busy():\n    return 'the owner watches a film'\ndef idle():\n    return None\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert own_check("own_check_for_test:busy") == "the owner watches a film"
    assert own_check("own_check_for_test:idle") is None
    assert own_check("true") is None
    assert own_check("false") == "limits.check ended with 1"
    assert own_check("sh -c 'echo too hot; exit 3'") == "too hot"
    for wrong in ("own_check_for_test:nothing", "no_such_module:f", "no-such-program", "'"):
        with pytest.raises(ConfigError, match=r"limits\.check is"):
            own_check(wrong)


def test_each_limit_has_its_reason(index: Index) -> None:
    Guard(index, Limits()).admit()
    with pytest.raises(LimitError, match="too hot"):
        Guard(index, Limits(check="sh -c 'echo too hot; exit 3'")).admit()
    with pytest.raises(LimitError, match="MiB of memory are free"):
        Guard(index, Limits(memory_mib=10**9)).admit()
    with pytest.raises(LimitError, match="this device gives 1 MiB"):
        Guard(index, Limits(process_mib=1)).check(0.5)
    Guard(index, Limits(process_mib=10**6, memory_mib=1)).check(0.5)
    assert (memory_free() or 0) > 2**20
    assert (memory_used() or 0) > 2**20
