"""Forked ClientApp processes: what they have loaded, what they have not, and what they outlive."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest
from flwr.supercore.constant import TaskType
from flwr.supercore.superexec import run_superexec as superexec
from flwr.supercore.superexec.executor import ExecutionSpec, LaunchResultStatus

from client import warm

TELL = """
import json, os, sys
told = {"loaded": sorted({name.partition(".")[0] for name in sys.modules}), "parent": os.getppid()}
with open(path, "w") as file:
    json.dump(told, file)
"""


@pytest.fixture
def executor() -> Iterator[warm.WarmExecutor]:
    made = warm.WarmExecutor()
    yield made
    forkserver._forkserver._stop()  # type: ignore[attr-defined]


def told_by_fork(executor: warm.WarmExecutor, path: Path) -> dict[str, Any]:
    process = executor._context.Process(target=exec, args=(TELL, {"path": str(path)}))
    executor._start(process)
    process.join(120)
    told: dict[str, Any] = json.loads(path.read_text())
    return told


def test_a_fork_has_torch_and_flower_and_nothing_of_ours(
    executor: warm.WarmExecutor, tmp_path: Path
) -> None:
    told = told_by_fork(executor, tmp_path / "told.json")
    assert {"torch", "numpy", "flwr", "PIL"} <= set(told["loaded"])
    # the run brings its own packages, which may be newer than those that are installed
    assert not {"client", "common", "server"} & set(told["loaded"])


def test_the_prepared_process_is_made_anew_if_it_was_killed(
    executor: warm.WarmExecutor, tmp_path: Path
) -> None:
    first = told_by_fork(executor, tmp_path / "first.json")["parent"]
    assert told_by_fork(executor, tmp_path / "second.json")["parent"] == first != os.getpid()
    os.kill(first, signal.SIGKILL)
    os.waitid(os.P_PID, first, os.WEXITED | os.WNOWAIT)  # it is dead, and left to its parent
    assert told_by_fork(executor, tmp_path / "third.json")["parent"] != first


def specification(task: TaskType, **changes: Any) -> ExecutionSpec:
    fields: dict[str, Any] = {
        "task_type": task,
        "runtime_api_address": "127.0.0.1:1",
        "token": "a-token",
        "insecure": True,
        "root_certificates_path": None,
        "runtime_dependency_install": False,
        "parent_pid": 77,
        "suppress_output": False,
        "task_id": 1,
    }
    return ExecutionSpec(**{**fields, **changes})


def test_a_message_is_worked_on_in_a_fork(
    executor: warm.WarmExecutor, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[dict[str, Any]] = []

    def forked(target: object, kwargs: dict[str, Any]) -> Any:
        asked.append({"target": target, **kwargs})
        return context.Process(target=os.getpid)

    context = warm.fork_server(warm.PRELOADED)
    monkeypatch.setattr(executor, "_context", type("", (), {"Process": staticmethod(forked)}))
    authority = tmp_path / "ca.crt"
    authority.write_bytes(b"certificate")
    secure = {"insecure": False, "root_certificates_path": str(authority)}
    done = executor.launch(specification(TaskType.CLIENT_APP, **secure))
    assert done.status is LaunchResultStatus.ACCEPTED
    assert asked == [
        {
            "target": warm.run_clientapp,
            "runtime_api_address": "127.0.0.1:1",
            "token": "a-token",
            "insecure": False,
            "certificates": b"certificate",
            "parent_pid": 77,
            "runtime_dependency_install": False,
        }
    ]
    for process in executor._running:
        process.join(60)
    executor.reconcile()
    assert executor._running == []


def test_flowers_superexec_still_asks_for_its_executor_by_the_name_that_is_replaced() -> None:
    assert callable(superexec.get_executor)  # type: ignore[attr-defined]
    assert "get_executor" in superexec.run_superexec.__code__.co_names
