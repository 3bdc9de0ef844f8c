"""New data on the device: what is taken, what it is labelled, and how it goes again.

Every way in (a folder, the command line, the local service) ends in `Collector.add`.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

from client.index import Image, Index, Origin
from client.near import TINT, Looks, looks_of
from client.quota import make_room, trim
from client.settings import Collecting, DeviceSettings, read_settings
from common.data.dataset import Pixels
from common.data.decode import read_image
from common.errors import ConfigError, DataError

Outcome = Literal["kept", "relabelled", "duplicate", "near duplicate", "full"]
"""What became of an image: ``full`` was not drawn by the reservoir."""

_DAY = 86400.0


class NoConsentError(ConfigError):
    """Images of this source may not be kept."""


class Labeller(Protocol):
    """A model that can name what an image shows (see `client.pseudo`)."""

    digest: str

    def __call__(self, pixels: Pixels) -> tuple[str, float]:
        """Return the most probable class and its probability."""


@dataclass(frozen=True)
class Taken:
    """What became of an image that was brought: its digest, the outcome, its label."""

    digest: str
    outcome: Outcome
    label: str | None
    origin: Origin
    like: str | None = None


class Collector:
    """The store of a device, open for collecting.

    Parameters
    ----------
    index : Index
        The store.
    settings : DeviceSettings, optional
        By default those of the store.
    labeller : Labeller, optional
        Names images that come without a label.
    clock : callable
        Seconds since 1970.
    """

    def __init__(
        self,
        index: Index,
        settings: DeviceSettings | None = None,
        labeller: Labeller | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.index = index
        self.settings = settings or read_settings(index.folder)
        self._labeller = labeller
        self._clock = clock
        index.sweep()
        self.expire()

    # consent

    def consent(self, source: str) -> None:
        """Note that images of `source` may be kept and learnt from."""
        if not source:
            raise ConfigError("source is empty: name where the images come from")
        with self.index.writing():
            self.index.run("INSERT OR IGNORE INTO sources VALUES (?, ?)", (source, self._clock()))

    def withdraw(self, source: str) -> int:
        """End the consent for `source` and remove all that came from it; returns how many."""
        removed = 0
        while self._consented(source):
            removed += self.forget(source=source)
            with self.index.writing():
                # again if another process has brought an image meanwhile
                self.index.run(
                    "DELETE FROM sources WHERE name = ? "
                    "AND NOT EXISTS (SELECT 1 FROM images WHERE source = ?)",
                    (source, source),
                )
        return removed

    # images

    def add(self, data: bytes, name: str, source: str, label: str | None = None) -> Taken:
        """Take an image, if it is new and there is room.

        Parameters
        ----------
        data : bytes
            An image file in any format that Pillow reads.
        name : str
            For error messages.
        source : str
            Where it comes from; there must be consent for it.
        label : str, optional
            What it shows. Without it, the labeller's opinion counts if it is sure.

        Raises
        ------
        ConfigError
            Without consent, or for a label that is not allowed.
        DataError
            If it is no image, or too large.
        """
        rules = self.settings.collect
        self._check_source(source)
        label = self.check_label(label)
        if len(data) > rules.file_mib * 2**20:
            raise DataError(
                f"{name}: {len(data) / 2**20:.1f} MiB, file-mib allows {rules.file_mib:g}: "
                "make it smaller"
            )
        pixels = read_image(data, name)
        image = self._described(data, pixels, source, label)
        with self.index.writing():
            # Consent may have been withdrawn while the image was decoded.
            self._check_source(source)
            known, exact = self._known(image, rules.near)
            if known is not None and (label is None or known.origin in ("given", "corrected")):
                outcome: Outcome = "duplicate" if exact else "near duplicate"
                return Taken(known.digest, outcome, known.label, known.origin, known.digest)
            if known is None and not make_room(self.index, image.label, image.bytes, rules):
                return Taken(image.digest, "full", image.label, image.origin)
            if known is None:
                self.index.put(image, data)
                taken = Taken(image.digest, "kept", image.label, image.origin)
            else:  # a label that it lacked is welcome
                assert label is not None
                self._set_label(known.digest, label, "given")
                taken = Taken(known.digest, "relabelled", label, "given", known.digest)
        self.index.purge()
        return taken

    def label(self, start: str, label: str) -> Image:
        """Correct the label of the image whose digest begins with `start`.

        Frozen batches keep the label that they were frozen with until their step is over.

        Raises
        ------
        ConfigError
            If none or several begin so, or the label is not allowed.
        """
        self.check_label(label)
        with self.index.writing():
            image = self.find(start)
            self._set_label(image.digest, label, "corrected")
        self.index.purge()
        return replace(image, label=label, origin="corrected", confidence=None, model=None)

    def find(self, start: str, evicted: bool = False) -> Image:
        """Return the one image whose digest begins with `start`; `evicted` ones too if wanted."""
        if not start or set(start) - set("0123456789abcdef"):
            raise ConfigError(f"image '{start}': give the digest, or how it begins, in lower case")
        where = "evicted <= ? AND digest GLOB ?"
        found = self.index.images(where, (int(evicted), f"{start}*"))
        if len(found) != 1:
            many = "no image begins" if not found else f"{len(found)} images begin"
            raise ConfigError(f"image '{start}': {many} so; see `fallow-device collect list`")
        return found[0]

    def label_rest(self, labeller: Labeller) -> tuple[int, int]:
        """Let a model label what nobody has; returns how many got a label, and how many did not.

        What an earlier model labelled is asked again: where the new one is not sure, the label
        goes.
        """
        named = unsure = 0
        for image in self.index.images("evicted = 0 AND origin IN ('none', 'model')"):
            data = self.index.content(image.digest)
            if data is None:
                continue
            label, confidence = self._opinion(labeller, read_image(data, image.digest))
            named, unsure = named + (label is not None), unsure + (label is None)
            with self.index.writing():
                self.index.run(
                    "UPDATE images SET label = ?, origin = ?, confidence = ?, model = ? "
                    "WHERE digest = ? AND origin IN ('none', 'model')",
                    (
                        label,
                        "none" if label is None else "model",
                        None if label is None else confidence,
                        None if label is None else labeller.digest,
                        image.digest,
                    ),
                )
                if label is not None:
                    trim(self.index, label, self.settings.collect, "")
        self.index.purge()
        return named, unsure

    def forget(
        self,
        *,
        source: str | None = None,
        label: str | None = None,
        digest: str | None = None,
        older_days: float | None = None,
        everything: bool = False,
    ) -> int:
        """Remove images that all given conditions fit, rows and files; returns how many.

        Raises
        ------
        ConfigError
            If no condition is given.
        """
        where: list[str] = []
        values: list[Any] = []
        if source is not None:
            where, values = [*where, "source = ?"], [*values, source]
        if label is not None:
            where, values = [*where, "COALESCE(label, '') = ?"], [*values, label]
        if digest is not None:
            where, values = (
                [*where, "digest = ?"],
                [*values, self.find(digest, evicted=True).digest],
            )
        if older_days is not None:
            limit = self._clock() - older_days * _DAY
            where, values = [*where, "added < ?"], [*values, limit]
        if not where and not everything:
            raise ConfigError("nothing to forget is named: give a source, a label, an id or an age")
        return self.index.remove(" AND ".join(where) or "TRUE", values)

    def expire(self) -> int:
        """Remove what is older than the retention time; returns how many."""
        return expire(self.index, self.settings.collect, self._clock())

    def check_label(self, label: str | None) -> str | None:
        """Return `label` if it may be given.

        Raises
        ------
        ConfigError
            If the device's settings name other classes.
        """
        if label is None:
            return None
        classes = self.settings.collect.classes
        if not label or label != label.strip():
            raise ConfigError(f"label is {label!r}: it must not be empty or begin or end in spaces")
        if classes and label not in classes and label not in self.settings.labels:
            raise ConfigError(
                f"label '{label}' is none of {', '.join(classes[:20])}: correct it, or add it to "
                "[labels] in device.toml"
            )
        return label

    def _check_source(self, source: str) -> None:
        if not self._consented(source):
            raise NoConsentError(
                f"source '{source}' has no consent: `fallow-device collect consent {source}` first"
            )

    def _consented(self, source: str) -> bool:
        return bool(self.index.one("SELECT 1 FROM sources WHERE name = ?", (source,)))

    def _described(self, data: bytes, pixels: Pixels, source: str, label: str | None) -> Image:
        near = self.settings.collect.near >= 0
        looks = looks_of(pixels) if near else Looks(0, 0)
        origin: Origin = "none" if label is None else "given"
        confidence = model = None
        if label is None and self._labeller is not None:
            label, confidence = self._opinion(self._labeller, pixels)
            if label is not None:
                origin, model = "model", self._labeller.digest
        return Image(
            digest=hashlib.sha256(data).hexdigest(),
            source=source,
            label=label,
            origin=origin,
            confidence=confidence,
            model=model,
            added=self._clock(),
            bytes=len(data),
            shape=looks.shape,
            colour=looks.colour,
        )

    def _opinion(self, labeller: Labeller, pixels: Pixels) -> tuple[str | None, float | None]:
        label, probability = labeller(pixels)
        sure = probability >= self.settings.collect.confidence
        return (label, probability) if sure else (None, None)

    def _known(self, image: Image, near: int) -> tuple[Image | None, bool]:
        """Return the image that is there already, if any, and whether it is the very same."""
        same = self.index.images("digest = ? AND evicted = 0", (image.digest,))
        if same or near < 0:
            return (same[0] if same else None), True
        like = self.index.images(
            "evicted = 0 AND differ(shape, ?) <= ? AND tinted(colour, ?) <= ?",
            (image.shape, near, image.colour, TINT),
        )
        return (like[0] if like else None), False

    def _set_label(self, digest: str, label: str, origin: Origin) -> None:
        self.index.run(
            "UPDATE images SET label = ?, origin = ?, confidence = NULL, model = NULL "
            "WHERE digest = ?",
            (label, origin, digest),
        )
        trim(self.index, label, self.settings.collect, digest)


def expire(index: Index, rules: Collecting, now: float) -> int:
    """Remove what is older than the retention time at `now`; returns how many."""
    if not rules.retention_days:
        return 0
    return index.remove("added < ?", (now - rules.retention_days * _DAY,))
