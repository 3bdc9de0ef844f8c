"""A SuperExec whose ClientApp processes are forked from one that has torch loaded already.

Flower starts a new Python for every message, which on a small device spends longer importing torch
than training. Here a process that has imported torch and Flower, and nothing of any app, waits
(Python's own fork server); each message gets a fork of it, which then loads the app that the run
brought, as a fresh process would. What a message leaves behind in memory still ends with it.
"""

from __future__ import annotations

import argparse
import os
import signal
from multiprocessing.process import BaseProcess
from pathlib import Path

from flwr.supercore.constant import TaskType
from flwr.supercore.superexec import run_superexec as superexec
from flwr.supercore.superexec.executor import ExecutionSpec, LaunchResult, SubprocessExecutor
from flwr.supernode.runtime.run_clientapp import run_clientapp

from common.forks import fork_server

# Libraries alone. A package of ours would stand before the one that a run brings.
PRELOADED = [
    "numpy",
    "PIL.Image",
    "safetensors.numpy",
    "sqlite3",
    "torch",
    "flwr.supernode.runtime.run_clientapp",
]


class WarmExecutor(SubprocessExecutor):
    """Starts a ClientApp's process by forking the prepared one, which is made anew if killed."""

    def __init__(self) -> None:
        self._context = fork_server(PRELOADED)
        self._running: list[BaseProcess] = []

    def launch(self, spec: ExecutionSpec) -> LaunchResult:
        """Start the process of a task."""
        if spec.task_type is not TaskType.CLIENT_APP:
            return super().launch(spec)
        certificates = spec.root_certificates_path
        arguments = {
            "runtime_api_address": spec.runtime_api_address,
            "token": spec.token,
            "insecure": spec.insecure,
            "certificates": None if certificates is None else Path(certificates).read_bytes(),
            "parent_pid": spec.parent_pid,
            "runtime_dependency_install": spec.runtime_dependency_install,
        }
        # A function of Flower's: one of ours would import our package before the run's.
        self._start(self._context.Process(target=run_clientapp, kwargs=arguments))
        return LaunchResult.accepted()

    def reconcile(self) -> None:
        """Forget processes that have ended."""
        self._running = [process for process in self._running if process.is_alive()]

    def _start(self, process: BaseProcess) -> None:
        process.start()
        self._running.append(process)


def main() -> None:
    """Work for the SuperNode that started this process, until it ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runtime-api-address", required=True)
    parser.add_argument("--secret-file", type=Path, required=True)
    options = parser.parse_args()
    supernode = os.getppid()
    superexec.get_executor = lambda *_, **__: WarmExecutor()  # type: ignore[attr-defined]
    try:
        superexec.run_superexec(
            runtime_api_address=options.runtime_api_address,
            insecure=True,  # loopback
            superexec_auth_secret=options.secret_file.read_bytes(),
            parent_pid=supernode,
            runtime_dependency_install=False,
        )
    finally:
        # Without it the SuperNode would take messages that nobody works on: its service manager
        # starts both again.
        if os.getppid() == supernode:
            os.kill(supernode, signal.SIGTERM)
