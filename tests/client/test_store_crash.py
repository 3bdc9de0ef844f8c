"""A device may lose power at any point: what its index names is on the disk, and no more is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from test_collect import collector, png

from client.collect import Collector
from client.index import Index

ROOT = Path(__file__).parents[2]


class PowerCut(BaseException):
    """Nothing may catch it but the test."""


@contextmanager
def cut_at(point: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Stop at the `point`-th thing that is done to the disk, before it is done.

    Nothing is done after it either, as in a process that is gone.
    """
    done: list[str] = []
    with monkeypatch.context() as patched:

        def counted(name: str, real: Callable[..., object]) -> Callable[..., object]:
            def step(*arguments: object, **options: object) -> object:
                if len(done) >= point:
                    raise PowerCut
                done.append(name)
                return real(*arguments, **options)

            return step

        for name in ("replace", "fsync", "unlink", "chmod"):
            patched.setattr(os, name, counted(name, getattr(os, name)))
        patched.setattr(Path, "unlink", counted("unlink", Path.unlink))
        run = Index.run
        patched.setattr(Index, "run", counted("sql", run))
        yield done


def work(one: Collector) -> None:
    """All that changes a store."""
    one.add(png(1), "image", "camera", "cat")
    one.add(png(2), "image", "camera", "cat")
    one.add(png(3), "image", "camera", "cat")  # replaces one, or is not drawn
    one.label(one.index.images()[0].digest, "dog")
    one.forget(label="dog")
    one.withdraw("camera")


def whole(folder: Path) -> None:
    """Open the store as the next process does, and compare rows and files."""
    with Index.open(folder) as index:
        again = collector(index, class_quota=2)
        assert index.check() == []
        assert {image.digest for image in index.images("TRUE")} == {
            path.name for path in (folder / "images").iterdir()
        }
        taken = again.add(png(10**7), "image", "camera", "newt")
        assert taken.outcome == "kept"
        assert again.forget(label="newt") == 1


def test_a_cut_before_any_change_of_the_disk_leaves_a_whole_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    point = 0
    while True:
        folder = tmp_path / str(point)
        Index.create(folder).close()
        index = Index.open(folder)
        index.run("PRAGMA synchronous = OFF")  # what is tested is the order, not the disk
        index.set("secret", "the same for each, so that all do the same")
        one = collector(index, class_quota=2)
        cut = True
        with cut_at(point, monkeypatch) as done:
            try:
                work(one)
                cut = False
            except PowerCut:
                pass
        index.close()  # a transaction that was open is rolled back, as after a cut
        whole(folder)
        if not cut:
            break
        point += 1
    assert point == len(done) > 60
    assert {"replace", "fsync", "unlink", "sql"} <= set(done)


def test_a_file_is_synced_before_its_row_is_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Index.create(tmp_path) as index:
        one = collector(index)
        events: list[str] = []
        index._sql.set_trace_callback(
            lambda text: (
                events.append(text.split()[0]) if text[:6] in ("COMMIT", "INSERT") else None
            )
        )
        for name in ("fsync", "replace"):
            real = getattr(os, name)
            monkeypatch.setattr(
                os, name, lambda *a, _n=name, _r=real: (events.append(_n), _r(*a))[1]
            )
        one.add(png(1), "image", "camera", "cat")
        written = events.index("replace")
        assert events[written - 1 : written + 2] == ["fsync", "replace", "fsync"]
        assert "COMMIT" in events[written:]
        assert "COMMIT" not in events[events.index("INSERT") : written]
        for pragma, value in (("synchronous", 3), ("journal_mode", "delete"), ("secure_delete", 1)):
            assert index.one(f"PRAGMA {pragma}") == value


def test_a_store_whose_making_was_cut_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for point in range(200):
        folder = tmp_path / str(point)
        with cut_at(point, monkeypatch):
            try:
                Index.create(folder).close()
                break
            except PowerCut:
                pass
        Index.create(folder).close()
        whole(folder)
    assert 10 < point < 200


WRITER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_collect import collector, png
from client.index import Index
one = collector(Index.open(Path(sys.argv[1])))
for n in range(10**6):
    taken = one.add(png(n), "image", "camera", "cat")
    print(taken.outcome, taken.digest, flush=True)
    if n % 5 == 4:
        one.forget(label="cat")
        print("forgot", n, flush=True)
"""


@pytest.mark.slow
def test_a_writer_that_is_killed_leaves_a_whole_store(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    Index.create(folder).close()
    killed_at = set()
    for trial in range(20):
        command = [sys.executable, "-c", WRITER, str(folder), str(Path(__file__).parent)]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout is not None
            said = [writer.stdout.readline()]  # it has begun
            time.sleep(0.05 + 0.03 * trial)
            writer.send_signal(signal.SIGKILL)
            said += writer.stdout.read().splitlines(keepends=True)
        killed_at.add(len(said))
        with Index.open(folder) as index:
            kept = {image.digest for image in index.images()}
            lines = [line.split() for line in said if line.endswith("\n")]
            # What was told as kept is there, unless its forgetting was under way; what was told
            # as forgotten is not, so that only one image may have come since.
            if lines[-1][0] == "kept":
                assert lines[-1][1] in kept or not kept
            elif lines[-1][0] == "forgot":
                assert len(kept) <= 1
        whole(folder)
    assert len(killed_at) > 3
