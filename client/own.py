"""A real device: its images are those that it collected.

A step's batch is frozen when its first order arrives: all labelled images that are then in the
store, with the labels they then have. All rounds of the step see it, whatever is collected,
corrected or replaced meanwhile; only what is forgotten goes at once.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter

import numpy as np
import torch

from client.bases import Bases
from client.collect import expire
from client.heldout import heldout_share
from client.index import Index
from client.limits import Guard
from client.local import carry_out
from client.privacy import Privacy, chosen, epsilon_of, note_release, released
from client.settings import DeviceSettings, read_settings
from client.wire import Arrays
from common.accelerator import Accelerator
from common.config import Config
from common.data import ImageSet
from common.data.decode import read_image
from common.data.holdout import below
from common.errors import ConfigError, DataError, StoreError
from common.order import NetSpec, Order, Report
from common.process import settle
from common.seeds import numpy_rng
from common.store import read_state_and_header, write_state_file

KEPT_BATCHES = 2
"""A run that goes on after an interruption may still ask for the step before."""


class OwnDevice:
    """The device whose store is `index`.

    Parameters
    ----------
    index : Index
        Its store.
    config : Config
        Settings of the run, which an interruption does not change.
    run : str
        Name of the run as the engine has it; another one after every interruption.
    settings : DeviceSettings, optional
        By default those of the store.
    """

    def __init__(
        self, index: Index, config: Config, run: str, settings: DeviceSettings | None = None
    ) -> None:
        self._index = index
        self._config = config
        self._run = run
        self._settings = settings or read_settings(index.folder)
        self._guard = Guard(index, self._settings.limits)

    @property
    def device(self) -> str:
        """Name of the device: drawn once, kept in its store."""
        return self._index.name

    def split(self, order: Order) -> tuple[ImageSet, ImageSet]:
        """Return the images that an order trains on, and those that it measures with.

        An image whose label is a model's is in every so-many-th round only, drawn anew for each,
        so that it counts for `model-weight` of another in losses, statistics and counts alike;
        it never measures.

        Raises
        ------
        DataError
            If a label belongs to no class of the model, or an image does not fit it.
        """
        batch = self._frozen(order)
        share = self._heldout(order.heldout)
        rows = self._index.run(
            "SELECT digest, label, origin FROM members WHERE batch = ? ORDER BY digest", (batch,)
        )
        # The names are the model's, the labels this device's.
        labels = class_indices([row[1] for row in rows], order.net, self._settings.labels)
        used = [(row[0], label, row[2]) for row, label in zip(rows, labels, strict=True)]
        used = [row for row in used if row[1] >= 0]
        images, lost = self._pixels(batch, [row[0] for row in used], order.net)
        used = [row for row in used if row[0] not in lost]
        heldout = np.array([below(bytes.fromhex(row[0]), share) for row in used], np.bool_)
        guessed = np.array([row[2] == "model" for row in used], np.bool_)
        key = (order.run, order.step, order.phase, order.attempt, order.round, self.device)
        drawn = numpy_rng("model labels", *key).random(len(used))
        shown = ~guessed | (drawn < self._settings.collect.model_weight)
        every = ImageSet(
            images, np.array([row[1] for row in used], np.int64), order.net.class_names
        )
        trained_on = every.select(~heldout & shown)
        self._guard.expect(order, len(trained_on))
        return trained_on, every.select(heldout & ~guessed)

    def carry_out(
        self, order: Order, arrays: Arrays, bases: Bases, accelerator: Accelerator
    ) -> tuple[Report, np.ndarray | None]:
        """Do what an order asks, within the device's limits and under its noise.

        Raises
        ------
        FallowError
            If the device declines, saying why.
        """
        self._guard.admit()
        settle(self._settings.limits.threads)
        privacy = self._privacy()
        noised = privacy is not None and privacy.noise > 0
        if noised and order.phase in ("look", "tally"):
            raise ConfigError(
                "this device noises what it sends, but statistics of images go without noise: "
                "run with shift=never"
            )
        report, update = carry_out(
            order, arrays, self, bases, accelerator, privacy=privacy, check=self._guard.check
        )
        if report.declined is not None:
            return report, update
        self._guard.finished()
        if privacy is not None and noised:
            if update is not None and order.phase in ("grow", "consolidate"):
                note_release(self._index, order, update, privacy.noise)
            report = report.model_copy(update={"epsilon": epsilon_of(released(self._index))})
        return report, update

    def _privacy(self) -> Privacy | None:
        own = self._settings.privacy
        config = self._config
        return chosen(config.dp_clip, config.dp_noise, own.clip, own.noise, self._index.secret)

    def _frozen(self, order: Order) -> int:
        """Return the batch of the order's step, frozen now if the step begins."""
        index = self._index
        key = (self._config.digest, order.step)
        with index.writing():
            found = index.one(
                "SELECT id FROM batches WHERE settings = ? AND step = ? AND run = ?",
                (*key, self._run),
            )
            if found is not None:
                return int(found)
            last = index.one(
                "SELECT id FROM batches WHERE settings = ? AND step = ? ORDER BY id DESC", key
            )
            if last is not None and not _begins(order):
                # The same run, gone on with: its rounds have seen that batch.
                index.run("UPDATE batches SET run = ? WHERE id = ?", (self._run, last))
                return int(last)
        expire(index, self._settings.collect, time.time())
        with index.writing():
            # A label that is no class stops the batch, not the step: it can still be corrected.
            labels = index.run("SELECT label FROM images WHERE evicted = 0 AND label IS NOT NULL")
            class_indices([label for (label,) in labels], order.net, self._settings.labels)
            index.run("DELETE FROM batches WHERE settings = ? AND step >= ?", key)
            index.run(
                "INSERT INTO batches (settings, run, step, frozen) VALUES (?, ?, ?, ?)",
                (key[0], self._run, order.step, time.time()),
            )
            batch = int(index.one("SELECT last_insert_rowid()"))
            index.run(
                "INSERT INTO members SELECT ?, digest, label, origin FROM images "
                "WHERE evicted = 0 AND label IS NOT NULL",
                (batch,),
            )
            index.run(
                "DELETE FROM batches WHERE id NOT IN "
                "(SELECT id FROM batches ORDER BY id DESC LIMIT ?)",
                (KEPT_BATCHES,),
            )
        index.drop_decoded()
        index.sweep()
        return batch

    def _heldout(self, asked: float) -> float:
        """Return the share that is held out, and remember it."""
        before = heldout_share(self._index, 0.0)
        share = max(asked, before, self._settings.collect.heldout)
        if share > before:
            self._index.set("heldout", repr(share))
        return share

    def _pixels(self, batch: int, digests: list[str], net: NetSpec) -> tuple[np.ndarray, set[str]]:
        """Return the images as the net takes them, and which are gone or altered on the disk.

        Decoding photos takes longer than training on them, and each round is a new process: the
        pixels are kept for the step.
        """
        name = hashlib.sha256(repr((batch, digests, net.input_shape)).encode()).hexdigest()
        path = self._index.folder / "decoded" / f"{name}.safetensors"
        channels, height, width = net.input_shape
        try:
            state, header = read_state_and_header(path)
            return state["images"].numpy(), set(filter(None, header["lost"].split(",")))
        except (StoreError, KeyError):
            pass
        images, lost = [], set()
        size = height if height == width else None
        for digest in digests:
            data = self._index.content(digest)
            if data is None:
                lost.add(digest)
                continue
            pixels = read_image(data, digest[:12], size=size, channels=channels)
            if pixels.shape[:2] != (height, width):
                raise DataError(
                    f"image {digest[:12]} has {pixels.shape[1]}x{pixels.shape[0]} pixels, the "
                    f"model needs exactly {width}x{height}: `fallow-device forget --id "
                    f"{digest[:12]}`, and bring images of that size"
                )
            images.append(pixels)
        shape = (len(images), height, width, channels)
        array = np.stack(images) if images else np.zeros(shape, np.uint8)
        with self._index.writing():
            there = {one for (one,) in self._index.run("SELECT digest FROM images")}
            if images and there.issuperset(digests):  # nothing was forgotten meanwhile
                pixels_of = {"images": torch.from_numpy(array)}
                write_state_file(path, pixels_of, lost=",".join(sorted(lost)))
        return array, lost


def _begins(order: Order) -> bool:
    """Whether no round of the order's step can be over: then nothing has seen its batch."""
    first = (
        order.phase == "look"
        or (order.phase == "weigh" and order.step == 0)
        or (order.phase == "grow" and not order.class_counts)
    )
    return first and order.round == 0 and order.attempt == 0


def class_indices(labels: list[str], net: NetSpec, renamed: dict[str, str]) -> list[int]:
    """Return each label's class index; -1 where the device's settings leave it out.

    Parameters
    ----------
    labels : list of str
        The device's own.
    net : NetSpec
        Names the model's classes.
    renamed : dict of str to str
        ``[labels]`` of the device's settings.

    Raises
    ------
    DataError
        If the model has no such class, or does not name its classes.
    """
    if not net.class_names:
        raise DataError("the server does not name its model's classes: update it")
    position = {name: i for i, name in enumerate(net.class_names)}
    found = []
    unknown: Counter[str] = Counter()
    for label in labels:
        name = renamed.get(label, label)
        if name and name not in position:
            unknown[label] += 1
        found.append(position.get(name, -1) if name else -1)
    if unknown:
        most = sorted(unknown.items(), key=lambda item: (-item[1], item[0]))[:3]
        named = ", ".join(f"'{label}' ({n} images)" for label, n in most)
        classes = ", ".join(net.class_names[:10]) + (", ..." if len(net.class_names) > 10 else "")
        raise DataError(
            f"label {named} is none of the model's classes ({classes}): correct it, or name its "
            "class in [labels] of device.toml ('' leaves it out)"
        )
    return found
