"""The local service through which a camera process brings images: gRPC on a Unix socket.

On loopback too, for what cannot open a socket file; everyone on the device can then reach it. It
never listens to another address. With health service and reflection, so that grpcurl and service
managers can look at it.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any, NoReturn

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from client.collect import Collector, NoConsentError
from client.status import status
from common import collect_pb2 as pb
from common import collect_pb2_grpc
from common.errors import ConfigError, DiskError, FallowError, StoreError

NAME = pb.DESCRIPTOR.services_by_name["Collect"].full_name
_WORKERS = 4
_OVERHEAD = 2**16
_HOUR = 3600.0


class CollectService(collect_pb2_grpc.CollectServicer):
    """Answers for one collector.

    Parameters
    ----------
    collector : Collector
        Used by one call at a time.
    """

    def __init__(self, collector: Collector) -> None:
        self._collector = collector
        self._lock = Lock()

    def Add(self, request: pb.AddRequest, context: grpc.ServicerContext) -> pb.AddReply:  # noqa: N802
        """Offer an image."""
        with self._answering(context):
            taken = self._collector.add(
                request.file, "image", request.source, request.label or None
            )
        return pb.AddReply(
            outcome=taken.outcome,
            digest=taken.digest,
            label=taken.label or "",
            origin=taken.origin,
        )

    def Label(self, request: pb.LabelRequest, context: grpc.ServicerContext) -> pb.LabelReply:  # noqa: N802
        """Correct a label."""
        with self._answering(context):
            image = self._collector.label(request.digest, request.label)
        return pb.LabelReply(digest=image.digest, label=request.label)

    def Forget(self, request: pb.ForgetRequest, context: grpc.ServicerContext) -> pb.ForgetReply:  # noqa: N802
        """Remove images."""
        given: dict[str, Any] = {
            name: getattr(request, name)
            for name in ("source", "label", "digest", "older_days")
            if request.HasField(name)
        }
        with self._answering(context):
            removed = self._collector.forget(**given)
        return pb.ForgetReply(removed=removed)

    def Status(self, request: pb.StatusRequest, context: grpc.ServicerContext) -> pb.StatusReply:  # noqa: N802
        """Tell what the store holds."""
        with self._answering(context):
            told = status(self._collector.index)
        return pb.StatusReply(json=json.dumps(told))

    @property
    def largest(self) -> int:
        """Bytes of the largest message that is taken."""
        return int(self._collector.settings.collect.file_mib * 2**20) + _OVERHEAD

    def expire(self) -> None:
        """Remove what is older than the retention time."""
        with self._lock:
            self._collector.expire()

    @contextlib.contextmanager
    def _answering(self, context: grpc.ServicerContext) -> Iterator[None]:
        try:
            with self._lock:
                yield
        except FallowError as error:
            _abort(context, error)


def _abort(context: grpc.ServicerContext, error: FallowError) -> NoReturn:
    code = grpc.StatusCode.INVALID_ARGUMENT
    if isinstance(error, NoConsentError):
        code = grpc.StatusCode.FAILED_PRECONDITION
    elif isinstance(error, DiskError):
        code = grpc.StatusCode.RESOURCE_EXHAUSTED
    elif isinstance(error, StoreError):
        code = grpc.StatusCode.INTERNAL
    context.abort(code, str(error))
    raise AssertionError("abort raises")


@contextlib.contextmanager
def serving(service: CollectService, socket: Path | None, port: int | None) -> Iterator[str]:
    """Serve while the context lasts; yields the address.

    Parameters
    ----------
    service : CollectService
        Answers the calls.
    socket : Path, optional
        Of the Unix socket, which only this user may open.
    port : int, optional
        On loopback, instead; 0 = any that is free.

    Raises
    ------
    ConfigError
        If it cannot listen there.
    """
    server = grpc.server(
        ThreadPoolExecutor(_WORKERS),
        options=[
            ("grpc.max_receive_message_length", service.largest),
            ("grpc.so_reuseport", 0),  # a second service on the same port fails instead
        ],
    )
    collect_pb2_grpc.add_CollectServicer_to_server(service, server)  # type: ignore[no-untyped-call]
    healthy = health.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(healthy, server)
    names = (NAME, health.SERVICE_NAME, reflection.SERVICE_NAME)
    reflection.enable_server_reflection(names, server)
    address = _listen(server, socket, port)
    server.start()
    for name in ("", NAME):
        healthy.set(name, health_pb2.HealthCheckResponse.SERVING)
    try:
        yield address
    finally:
        healthy.enter_graceful_shutdown()
        server.stop(grace=5).wait()
        if socket is not None:
            socket.unlink(missing_ok=True)


def _listen(server: Any, socket: Path | None, port: int | None) -> str:
    if socket is None:
        try:
            bound = server.add_insecure_port(f"127.0.0.1:{port or 0}")
        except RuntimeError as error:
            raise ConfigError(f"--port is {port}: {error}; choose another") from None
        return f"127.0.0.1:{bound}"
    address = f"unix:{socket.absolute()}"
    if socket.exists() and not socket.is_socket():
        raise ConfigError(f"--socket is {socket}: a file that is no socket lies there")
    if _answers(address):
        raise ConfigError(f"--socket is {socket}: another service answers there already")
    socket.unlink(missing_ok=True)  # of a service that was killed
    before = os.umask(0o177)
    try:
        server.add_insecure_port(address)
    except RuntimeError as error:
        raise ConfigError(f"--socket is {socket}: {error}; choose another") from None
    finally:
        os.umask(before)
    return address


def _answers(address: str) -> bool:
    with grpc.insecure_channel(address) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=0.5)
        except grpc.FutureTimeoutError:
            return False
    return True


def serve(
    collector: Collector,
    socket: Path | None,
    port: int | None,
    tell: Callable[[str], None],
    wait: Callable[[float], object],
) -> None:
    """Serve until `wait` raises; what is too old goes every hour."""
    service = CollectService(collector)
    with serving(service, socket, port) as address:
        tell(f"listening on {address}")
        while True:
            service.expire()
            wait(_HOUR)
