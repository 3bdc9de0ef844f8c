"""Devices with stores of their own run a whole step, and no image leaves them."""

from __future__ import annotations

import base64
import io
import json
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_grid import FakeGrid
from flwr.app import Context, Message, RecordDict
from flwr.common.serde import recorddict_to_proto
from leaks import Secret, find_images
from PIL import Image

from client.app import make_app
from client.collect import Collector
from client.index import Index
from client.status import status
from common.codec import Rows, encode, no_rows
from common.config import Config
from common.data import ImageSet, open_source
from server.progress import NullProgress
from server.run import conduct

SETTINGS: dict[str, Any] = {
    "data": "digits",
    "net": "resnet8",
    "width": 8,
    "devices": 2,
    "steps": 1,
    "prior-size": 200,
    "prior-epochs": 4,
    "statistics-gap": 1,  # a prior so little trained falls behind its statistics
    "freeing-epochs": 2,
    "rounds": 2,
    "epochs": 1,
    "consolidate-rounds": 1,
    "consolidate-epochs": 1,
    "max-drop": 1.0,
    "accept-drop": 1.0,
}
RNG = np.random.default_rng(4)


@dataclass(frozen=True)
class Run:
    """A run that is over: everything that travelled, and the stores of its devices."""

    traffic: bytes
    stores: list[Path]
    secrets: list[Secret]
    out: Path


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels if pixels.shape[2] == 3 else pixels[..., 0]).save(file, "PNG")
    return file.getvalue()


def fill(store: Path, images: ImageSet) -> None:
    with Index.create(store) as index:
        collector = Collector(index)
        collector.consent("camera")
        for pixels, label in zip(images.images, images.labels, strict=True):
            collector.add(png(pixels), "image", "camera", images.classes[label])


def play(folder: Path, settings: dict[str, Any], images: int = 100) -> Run:
    source = open_source("digits")
    stores, secrets, traffic = [], [], bytearray()
    for number in range(2):
        taken = source.take(np.arange(number * images, (number + 1) * images))
        stores.append(folder / f"store-{number}")
        fill(stores[-1], taken)
        secrets += [Secret(png(pixels), pixels) for pixels in taken.images]
    config = Config.parse(settings)
    app = make_app(config.flat())

    def node(number: int) -> Any:
        def answer(message: Message) -> Message:
            traffic.extend(recorddict_to_proto(message.content).SerializeToString())
            where: dict[str, Any] = {"store": str(stores[number])}
            context = Context(7, number, where, RecordDict(), {})
            reply = app(message, context)
            traffic.extend(recorddict_to_proto(reply.content).SerializeToString())
            return reply

        return answer

    grid = FakeGrid({1: node(0), 2: node(1)})
    conduct(grid, config, folder / "out", engine="inline", resume=False, progress=NullProgress())
    return Run(bytes(traffic), stores, secrets, folder / "out")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return play(tmp_path_factory.mktemp("run"), SETTINGS)


def test_two_stores_carry_a_step_from_look_to_judge(run: Run) -> None:
    rounds = [json.loads(line) for line in (run.out / "rounds.jsonl").read_text().splitlines()]
    phases = [line["phase"] for line in rounds]
    whole = ["look", "grow", "grow", "weigh", "consolidate", "judge", "tally", "advise"]
    assert phases == whole
    assert all(line["devices_used"] == 2 and not line["declined"] for line in rounds)
    assert (run.out / "models" / "step-1" / "model.onnx").is_file()
    for store in run.stores:
        with Index.open(store) as index:
            told = status(index)
            assert told["batches"][0]["images"] == told["images"] > 50


def test_no_image_is_in_anything_that_travelled(run: Run) -> None:
    assert len(run.traffic) > 100_000
    assert find_images(run.traffic, run.secrets[::4]) == []


def colour(seed: int) -> Secret:
    smooth = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    pixels = np.asarray(Image.fromarray(smooth).resize((16, 16), Image.Resampling.BICUBIC))
    return Secret(png(pixels), pixels)


def filters(values: np.ndarray) -> Rows:
    edges = np.arange(0, values.size + 1, 64)
    return Rows(values.size, np.stack([edges[:-1], edges[1:]], axis=1))


def hidden(secret: Secret) -> dict[str, bytes]:
    """The ways in which an image might travel."""
    pixels = secret.pixels
    floats = (pixels.astype(np.float32) / 255 - 0.4) / 0.3
    weights = RNG.normal(0, 0.05, 640).astype(np.float32)
    amid = np.concatenate([weights, floats.ravel() * 0.01, weights]).astype(np.float32)
    zipped = io.BytesIO()
    with zipfile.ZipFile(zipped, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a", pixels.tobytes())
    return {
        "the file": secret.file,
        "the file in base64": base64.b64encode(secret.file),
        "the file in base64, amid text": b'{"stem": "x' + base64.b64encode(secret.file) + b'"}',
        "pixels": pixels.tobytes(),
        "planes": pixels.transpose(2, 0, 1).tobytes(),
        "pixels, deflated": zlib.compress(pixels.tobytes()),
        "pixels in a zip": zipped.getvalue(),
        "normalised, float32": floats.tobytes(),
        "normalised planes, float16": floats.transpose(2, 0, 1).astype("<f2").tobytes(),
        "float64": (pixels / 255.0).tobytes(),
        "amid weights": amid.tobytes(),
        "amid weights, fp16 code": encode(amid, no_rows(amid.size), "fp16"),
        "amid weights, int8 code": encode(amid, filters(amid), "int8", RNG),
    }


@pytest.mark.parametrize("way", list(hidden(colour(1))))
@pytest.mark.parametrize("grey", [False, True])
def test_the_search_finds_an_image_that_does_travel(way: str, grey: bool) -> None:
    secret = colour(2)
    if grey:
        secret = Secret(png(secret.pixels[..., :1]), secret.pixels[..., :1])
    noise = RNG.integers(0, 256, 3001, dtype=np.uint8).tobytes()
    traffic = noise + hidden(secret)[way] + noise
    found = find_images(traffic, [colour(3), secret])
    assert found
    assert all(line.startswith("image 1") for line in found)
