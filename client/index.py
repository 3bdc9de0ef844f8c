"""A device's images on disk: files named by their digest, and an SQLite index of them.

::

    STORE/index.sqlite3      what is known of each image, consent, frozen batches
    STORE/images/DIGEST      the files, as they came
    STORE/decoded/           frozen batches as pixels; can be made again at any time
    STORE/device.toml        the owner's settings (see `client.settings`)

What is in the index is on disk: a file is written, synced and renamed before its row is committed,
and removed only after its row is gone. A power cut in between leaves a file without a row, which
`Index.sweep` removes. Every change takes SQLite's write lock before it touches a file, so that
several processes may share a store.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import sqlite3
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from client.near import differ, tinted
from common.disk import disk_errors, sync_folder, write_bytes
from common.errors import DiskError, StoreError

Origin = Literal["none", "given", "corrected", "model"]
"""Where a label is from: nobody, whoever brought the image, a later hand, the model itself."""

FORMAT = 1
_FILE = "index.sqlite3"
_WAIT_SECONDS = 60.0

_SCHEMA = (
    "CREATE TABLE about (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID",
    "CREATE TABLE sources (name TEXT PRIMARY KEY, consented REAL NOT NULL) WITHOUT ROWID",
    """CREATE TABLE images (
        digest TEXT PRIMARY KEY,
        source TEXT NOT NULL REFERENCES sources(name),
        label TEXT,
        origin TEXT NOT NULL CHECK (origin IN ('none', 'given', 'corrected', 'model')),
        confidence REAL,
        model TEXT,
        added REAL NOT NULL,
        bytes INTEGER NOT NULL,
        shape INTEGER NOT NULL,
        colour INTEGER NOT NULL,
        evicted INTEGER NOT NULL DEFAULT 0,
        CHECK ((label IS NULL) = (origin = 'none'))
    ) WITHOUT ROWID""",
    "CREATE INDEX by_label ON images (label, evicted)",
    "CREATE TABLE offered (label TEXT PRIMARY KEY, count INTEGER NOT NULL) WITHOUT ROWID",
    """CREATE TABLE batches (
        id INTEGER PRIMARY KEY,
        settings TEXT NOT NULL,
        run TEXT NOT NULL,
        step INTEGER NOT NULL,
        frozen REAL NOT NULL
    )""",
    """CREATE TABLE members (
        batch INTEGER NOT NULL REFERENCES batches(id) ON DELETE CASCADE,
        digest TEXT NOT NULL REFERENCES images(digest) ON DELETE CASCADE,
        label TEXT NOT NULL,
        origin TEXT NOT NULL,
        PRIMARY KEY (batch, digest)
    ) WITHOUT ROWID""",
    "CREATE INDEX by_image ON members (digest)",
    """CREATE TABLE releases (
        key TEXT PRIMARY KEY,
        noise REAL NOT NULL,
        sent REAL NOT NULL
    ) WITHOUT ROWID""",
)


_COLUMNS = (
    "digest",
    "source",
    "label",
    "origin",
    "confidence",
    "model",
    "added",
    "bytes",
    "shape",
    "colour",
    "evicted",
)


@dataclass(frozen=True)
class Image:
    """A row of the index.

    Attributes
    ----------
    digest : str
        SHA-256 (hex) of the file.
    source : str
        Where it came from.
    label : str or None
        The device's own name for what it shows.
    origin : str
        Who said so.
    confidence, model : float, str or None
        Of a label that a model gave: its probability, and the model's digest.
    added : float
        Seconds since 1970.
    bytes : int
        Size of the file.
    shape, colour : int
        Perceptual hashes (see `client.near`).
    evicted : int
        1 if it was replaced by another and is kept only for the batch that it is frozen in.
    """

    digest: str
    source: str
    label: str | None
    origin: Origin
    confidence: float | None
    model: str | None
    added: float
    bytes: int
    shape: int
    colour: int
    evicted: int = 0


class Index:
    """The store in `folder`; made by :meth:`open` or :meth:`create`.

    Attributes
    ----------
    folder : Path
        The store.
    """

    def __init__(self, folder: Path, connection: sqlite3.Connection) -> None:
        self.folder = folder
        self._sql = connection
        self._writing = False

    @classmethod
    def open(cls, folder: Path) -> Index:
        """Open a store.

        Raises
        ------
        StoreError
            If there is none, or it is damaged or of a newer format.
        """
        if not (folder / _FILE).is_file():
            raise StoreError(f"{folder} holds no store: make one with `fallow-device collect init`")
        index = cls(folder, _connect(folder))
        version = index._version()
        if version == 0:
            raise StoreError(f"{folder} holds no store yet: run `fallow-device collect init` again")
        if version != FORMAT:
            raise StoreError(
                f"{folder} has format {version}, this program reads {FORMAT}: update it"
            )
        return index

    @classmethod
    def create(cls, folder: Path) -> Index:
        """Open a store, made if there is none."""
        with disk_errors(folder):
            (folder / "images").mkdir(parents=True, exist_ok=True)
            folder.chmod(0o700)
            sync_folder(folder)
        index = cls(folder, _connect(folder))
        if index._version() == 0:
            with index.writing():
                if index._version() == 0:  # not made by another process meanwhile
                    for statement in _SCHEMA:
                        index.run(statement)
                    index.set("name", f"device-{secrets.token_hex(8)}")
                    index.set("secret", secrets.token_hex(32))
                    index.run(f"PRAGMA user_version = {FORMAT}")
            with disk_errors(folder):
                sync_folder(folder)
        return cls.open(folder)

    def close(self) -> None:
        """Close the index."""
        self._sql.close()

    def __enter__(self) -> Index:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the write lock; what is done inside is committed together, or not at all."""
        if self._writing:  # part of what the caller commits
            yield
            return
        with _sqlite_errors(self.folder):
            self._sql.execute("BEGIN IMMEDIATE")
        self._writing = True
        try:
            yield
            with _sqlite_errors(self.folder):
                self._sql.execute("COMMIT")
        except BaseException:
            with contextlib.suppress(sqlite3.Error):
                self._sql.execute("ROLLBACK")
            raise
        finally:
            self._writing = False

    def run(self, statement: str, values: Iterable[Any] = ()) -> list[Any]:
        """Execute one statement and return its rows."""
        with _sqlite_errors(self.folder):
            return self._sql.execute(statement, tuple(values)).fetchall()

    def one(self, statement: str, values: Iterable[Any] = ()) -> Any:
        """Return the first column of the first row, or None."""
        rows = self.run(statement, values)
        return rows[0][0] if rows else None

    # what the store says of itself

    @property
    def name(self) -> str:
        """The device's name: drawn when the store was made, the same for ever."""
        return str(self.about("name"))

    @property
    def secret(self) -> str:
        """What nobody else knows, from which noise is drawn."""
        return str(self.about("secret"))

    def about(self, key: str) -> str | None:
        """Return what was set under `key`."""
        value = self.one("SELECT value FROM about WHERE key = ?", (key,))
        return None if value is None else str(value)

    def set(self, key: str, value: str) -> None:
        """Keep `value` under `key`."""
        with self.writing():
            self.run("INSERT OR REPLACE INTO about VALUES (?, ?)", (key, value))

    # images

    def path(self, digest: str) -> Path:
        """Return where an image's file is."""
        return self.folder / "images" / digest

    def images(self, where: str = "evicted = 0", values: Iterable[Any] = ()) -> list[Image]:
        """Return rows, in the order of their digests."""
        rows = self.run(f"SELECT * FROM images WHERE {where} ORDER BY digest", values)
        return [Image(*row) for row in rows]

    def image(self, digest: str) -> Image | None:
        """Return the row of an image, also of an evicted one."""
        rows = self.images("digest = ?", (digest,))
        return rows[0] if rows else None

    def put(self, image: Image, data: bytes) -> None:
        """Keep an image; `data` is on disk before its row is."""
        with self.writing():
            write_bytes(self.path(image.digest), data)
            row = tuple(getattr(image, name) for name in _COLUMNS)
            marks = ", ".join("?" * len(row))
            again = ", ".join(f"{name} = excluded.{name}" for name in _COLUMNS[1:])
            # not OR REPLACE, which would delete the row and with it its place in a frozen batch
            self.run(
                f"INSERT INTO images VALUES ({marks}) ON CONFLICT (digest) DO UPDATE SET {again}",
                row,
            )

    def content(self, digest: str) -> bytes | None:
        """Return an image's file; None if it is gone or altered."""
        try:
            data = self.path(digest).read_bytes()
        except OSError:
            return None
        return data if hashlib.sha256(data).hexdigest() == digest else None

    def evict(self, digest: str) -> None:
        """Take an image out; its file stays while a frozen batch needs it."""
        with self.writing():
            self.run("UPDATE images SET evicted = 1 WHERE digest = ?", (digest,))

    def remove(self, where: str, values: Iterable[Any] = ()) -> int:
        """Remove images for good, from frozen batches too; returns how many.

        When this returns, neither row nor file nor decoded pixels are left.
        """
        values = tuple(values)
        with self.writing():
            gone = [image.digest for image in self.images(where, values)]
            self.run(f"DELETE FROM images WHERE {where}", values)
            if gone:
                self.drop_decoded()
        self._unlink(gone)
        return len(gone)

    def purge(self) -> None:
        """Remove evicted images that no batch needs any more."""
        self.remove("evicted = 1 AND digest NOT IN (SELECT digest FROM members)")

    def sweep(self) -> int:
        """Remove what an interruption or an ended batch left behind; returns how many files."""
        self.purge()
        return self._unlink(os.listdir(self.folder / "images"))

    def _unlink(self, names: Iterable[str]) -> int:
        """Remove the files that have no row."""
        count = 0
        # under the lock: another process may just be bringing the same image
        with self.writing(), disk_errors(self.folder):
            kept = {digest for (digest,) in self.run("SELECT digest FROM images")}
            for name in names:
                if name not in kept:
                    with contextlib.suppress(FileNotFoundError):
                        self.path(name).unlink()
                        count += 1
            if count:
                sync_folder(self.folder / "images")
        return count

    def drop_decoded(self) -> None:
        """Remove decoded batches; they are made again when needed."""
        with disk_errors(self.folder):
            for path in (self.folder / "decoded").glob("*"):
                path.unlink(missing_ok=True)

    def check(self) -> list[str]:
        """Return what is wrong: an image whose file is gone or altered, a damaged index."""
        wrong = [str(row[0]) for row in self.run("PRAGMA integrity_check") if row[0] != "ok"]
        wrong += [f"row without its image: {row}" for row in self.run("PRAGMA foreign_key_check")]
        for image in self.images("TRUE"):
            if self.content(image.digest) is None:
                wrong.append(f"image {image.digest[:12]}: its file is gone or altered")
        return wrong

    def _version(self) -> int:
        return int(self.one("PRAGMA user_version"))


def _connect(folder: Path) -> sqlite3.Connection:
    with _sqlite_errors(folder):
        sql = sqlite3.connect(
            folder / _FILE, timeout=_WAIT_SECONDS, isolation_level=None, check_same_thread=False
        )
        # A rollback journal and not a log: what was forgotten is in no second file. EXTRA also
        # syncs the folder, so that a journal that is removed stays removed.
        for pragma in (
            "journal_mode = DELETE",
            "synchronous = EXTRA",
            "foreign_keys = ON",
            "secure_delete = ON",
        ):
            sql.execute(f"PRAGMA {pragma}")
    sql.create_function("differ", 2, differ, deterministic=True)
    sql.create_function("tinted", 2, tinted, deterministic=True)
    return sql


@contextlib.contextmanager
def _sqlite_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.OperationalError as error:
        text = str(error)
        if "full" in text or "disk I/O" in text or "readonly" in text:
            raise DiskError(f"{folder}: {text}; free some space or make it writable") from None
        if "locked" in text:
            raise StoreError(
                f"{folder}: another process has kept it locked for {_WAIT_SECONDS:.0f} s; end it"
            ) from None
        raise StoreError(f"{folder}: {text}; see `fallow-device doctor`") from None
    except sqlite3.DatabaseError as error:
        raise StoreError(f"{folder}: {error}; see `fallow-device doctor`") from None
