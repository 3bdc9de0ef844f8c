"""The local service: what a camera process can say, and who can reach it."""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)
from grpc_tools import protoc
from test_collect import Clock, collector, png

from client.index import Index
from client.service import NAME, CollectService, serve, serving
from common import collect_pb2 as pb
from common.collect_pb2_grpc import CollectStub
from common.errors import ConfigError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def index(tmp_path: Path) -> Iterator[Index]:
    with Index.create(tmp_path / "store") as made:
        yield made


@pytest.fixture
def channel(index: Index, tmp_path: Path) -> Iterator[Any]:
    with (
        serving(CollectService(collector(index, file_mib=1)), tmp_path / "c.sock", None) as address,
        grpc.insecure_channel(address) as made,
    ):
        yield made


def test_a_camera_brings_labels_and_forgets(channel: Any, index: Index) -> None:
    camera = CollectStub(channel)
    first = camera.Add(pb.AddRequest(file=png(1), source="camera"))
    assert (first.outcome, first.label, first.origin) == ("kept", "", "none")
    assert camera.Add(pb.AddRequest(file=png(1), source="camera")).outcome == "duplicate"
    corrected = camera.Label(pb.LabelRequest(digest=first.digest[:8], label="owl"))
    assert (corrected.digest, corrected.label) == (first.digest, "owl")
    told = json.loads(camera.Status(pb.StatusRequest()).json)
    assert told["labels"] == {"owl": 1}
    assert camera.Forget(pb.ForgetRequest(label="owl")).removed == 1
    assert index.images() == []


@pytest.mark.parametrize(
    ("request_", "code", "said"),
    [
        (
            pb.AddRequest(file=png(1), source="spy"),
            grpc.StatusCode.FAILED_PRECONDITION,
            "source 'spy' has no consent",
        ),
        (
            pb.AddRequest(file=b"text", source="camera"),
            grpc.StatusCode.INVALID_ARGUMENT,
            "not an image",
        ),
        (
            pb.AddRequest(file=bytes(2**20 + 1), source="camera"),
            grpc.StatusCode.INVALID_ARGUMENT,
            "file-mib allows 1",
        ),
        (
            pb.AddRequest(file=bytes(2**21), source="camera"),
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "larger than max",
        ),
        (pb.ForgetRequest(), grpc.StatusCode.INVALID_ARGUMENT, "nothing to forget is named"),
        (
            pb.LabelRequest(digest="00", label="owl"),
            grpc.StatusCode.INVALID_ARGUMENT,
            "no image begins so",
        ),
    ],
)
def test_what_is_refused_has_a_code_and_a_reason(
    request_: Any, code: grpc.StatusCode, said: str, channel: Any, index: Index
) -> None:
    camera = CollectStub(channel)
    method = getattr(camera, type(request_).__name__.removesuffix("Request"))
    with pytest.raises(grpc.RpcError) as caught:
        method(request_)
    assert caught.value.code() == code
    assert said in caught.value.details()
    assert index.images() == []
    assert camera.Add(pb.AddRequest(file=png(1), source="camera")).outcome == "kept"


def test_cameras_may_bring_images_at_the_same_time(channel: Any, index: Index) -> None:
    camera = CollectStub(channel)

    def bring(first: int) -> list[str]:
        seeds = range(first, first + 6)
        return [camera.Add(pb.AddRequest(file=png(n), source="camera")).outcome for n in seeds]

    with Index.open(index.folder) as other, ThreadPoolExecutor(4) as pool:  # another process
        brought = [pool.submit(bring, 100 * n) for n in range(4)]
        also = collector(other)
        outcomes = [also.add(png(n), "image", "camera").outcome for n in range(900, 906)]
        assert all(done.result() == ["kept"] * 6 for done in brought)
    assert outcomes == ["kept"] * 6
    assert len(index.images()) == len(list((index.folder / "images").iterdir())) == 30
    assert index.check() == []


def test_serving_removes_what_is_too_old_and_ends_when_it_is_told(
    index: Index, tmp_path: Path
) -> None:
    clock = Clock()
    one = collector(index, clock=clock, retention_days=1)
    one.add(png(1), "image", "camera")
    said: list[str] = []

    def wait(seconds: float) -> None:
        if not index.images():
            raise KeyboardInterrupt
        clock.now += seconds

    with pytest.raises(KeyboardInterrupt):
        serve(one, tmp_path / "c.sock", None, said.append, wait)
    assert said == [f"listening on unix:{tmp_path / 'c.sock'}"]
    assert not (tmp_path / "c.sock").exists()


def test_health_and_reflection_are_on(channel: Any) -> None:
    health = health_pb2_grpc.HealthStub(channel)
    for name in ("", NAME):
        answer = health.Check(health_pb2.HealthCheckRequest(service=name))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    services = ProtoReflectionDescriptorDatabase(channel).get_services()
    assert set(services) >= {NAME, "grpc.health.v1.Health"}
    described = ProtoReflectionDescriptorDatabase(channel).FindFileContainingSymbol(NAME)
    assert [method.name for method in described.service[0].method] == [
        "Add",
        "Label",
        "Forget",
        "Status",
    ]


def test_only_the_owner_can_open_the_socket(index: Index, tmp_path: Path) -> None:
    path = tmp_path / "c.sock"
    with serving(CollectService(collector(index)), path, None):
        assert stat.S_ISSOCK(path.stat().st_mode)
        assert path.stat().st_mode & 0o077 == 0
        with (
            pytest.raises(ConfigError, match="another service answers"),
            serving(CollectService(collector(index)), path, None),
        ):
            pass
        assert path.exists()
    assert not path.exists()
    path.write_text("mine")
    with (
        pytest.raises(ConfigError, match="a file that is no socket"),
        serving(CollectService(collector(index)), path, None),
    ):
        pass
    assert path.read_text() == "mine"


def test_a_port_is_one_of_loopback(index: Index) -> None:
    with serving(CollectService(collector(index)), None, 0) as address:
        host, port = address.split(":")
        assert host == "127.0.0.1"
        with grpc.insecure_channel(address) as channel:
            CollectStub(channel).Status(pb.StatusRequest())
        with (
            pytest.raises(ConfigError, match=f"--port is {port}"),
            serving(CollectService(collector(index)), None, int(port)),
        ):
            pass


def test_the_generated_code_is_that_of_the_proto(tmp_path: Path) -> None:
    arguments = ["protoc", f"-I{ROOT}"]
    arguments += [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    assert protoc.main([*arguments, str(ROOT / "common" / "collect.proto")]) == 0
    for name in ("collect_pb2.py", "collect_pb2.pyi", "collect_pb2_grpc.py"):
        made = (tmp_path / "common" / name).read_text()
        assert made == (ROOT / "common" / name).read_text(), f"run `make proto` for {name}"
