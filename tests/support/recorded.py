"""What goes over the wire between real processes."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress


@contextmanager
def recorded(port: int) -> Iterator[tuple[int, list[bytearray]]]:
    """Pass connections on to `port`; yields another port and all bytes that went through it.

    A connection and direction is an entry of its own, in the order in which the bytes came.
    """
    streams: list[bytearray] = []
    listener = socket.create_server(("127.0.0.1", 0))

    def pass_on(source: socket.socket, sink: socket.socket, seen: bytearray) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                seen += data
                sink.sendall(data)
        with suppress(OSError):
            sink.shutdown(socket.SHUT_WR)

    def connect(near: socket.socket, up: bytearray, down: bytearray) -> None:
        with near, socket.create_connection(("127.0.0.1", port)) as far:
            back = threading.Thread(target=pass_on, args=(far, near, down), daemon=True)
            back.start()
            pass_on(near, far, up)
            back.join()

    def accept() -> None:
        while True:
            try:
                near, _ = listener.accept()
            except OSError:  # closed below
                return
            streams.extend((bytearray(), bytearray()))
            threading.Thread(target=connect, args=(near, *streams[-2:]), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield listener.getsockname()[1], streams
    finally:
        listener.close()
