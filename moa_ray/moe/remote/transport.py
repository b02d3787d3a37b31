"""The data plane: framed messages of a small JSON header and one buffer of rows, over plain stream sockets.

Measured against Ray actor calls, ZeroMQ and `multiprocessing.connection` between the same processes
(`benchmarks/experts.py transport`), bare sockets are the fastest at every size below some MB, and they
alone tell of a killed peer at once. A caller on the worker's machine uses its Unix socket, others TCP.

A frame is two lengths (header, payload), the header, and the payload. No frame is ever unpickled.
"""

from __future__ import annotations

import hmac
import json
import os
import select
import socket
import struct
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_LENGTHS = struct.Struct("!IQ")
_MAX_HEADER = 1 << 20
_MAX_PAYLOAD = 1 << 36
_MAX_BUFFERS = 512  # of one sendmsg; the kernel takes 1024
_CONNECT_S = 2.0
_SOCKET_BUFFER = 4 << 20

Header = dict[str, Any]
Handler = Callable[[Header, Tensor], tuple[Header, Tensor | None]]
"""Answers a message: its header and its payload as uint8; returns the reply's."""


class ChannelLost(ConnectionError):
    """The peer is gone, or did not answer in time; the channel is closed."""


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server listens: a Unix socket for callers on its machine, TCP for the others."""

    path: str
    host: str
    port: int


def raw(tensor: Tensor) -> memoryview:
    """A contiguous CPU tensor's memory, not copied."""
    array: Any = tensor.detach().reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)


class Channel:
    """One connection; a request and its reply at a time.

    Args:
        sock: A connected socket.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        if sock.family == socket.AF_INET:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            sock.setsockopt(socket.SOL_SOCKET, option, _SOCKET_BUFFER)

    @classmethod
    def connect(cls, address: Address, secret: str) -> Channel:
        """Connects and shows the pool's secret.

        Raises:
            ChannelLost: Nobody listens there.
        """
        try:
            if os.path.exists(address.path):
                sock = socket.socket(socket.AF_UNIX)
                sock.settimeout(_CONNECT_S)
                sock.connect(address.path)
            else:
                sock = socket.create_connection((address.host, address.port), _CONNECT_S)
        except OSError as error:
            raise ChannelLost(f"nobody answers at {address.host}:{address.port}: {error}") from error
        channel = cls(sock)
        channel.send({"secret": secret}, (), time.monotonic() + _CONNECT_S)
        return channel

    def fileno(self) -> int:
        """The socket's number, for `poll`."""
        return self._socket.fileno()

    def close(self) -> None:
        """Safe to call twice."""
        self._socket.close()

    def send(self, header: Header, pieces: Sequence[memoryview], deadline: float) -> None:
        """Sends one frame, its payload gathered from pieces.

        Args:
            header: JSON values.
            pieces: Parts of the payload, in order.
            deadline: On the monotonic clock.

        Raises:
            ChannelLost: The peer is gone, or took nothing until the deadline.
        """
        head = json.dumps(header, separators=(",", ":")).encode()
        lengths = _LENGTHS.pack(len(head), sum(len(piece) for piece in pieces))
        left = [memoryview(lengths + head), *(piece for piece in pieces if len(piece))]
        try:
            while left:
                self._bound(deadline)
                sent = self._socket.sendmsg(left[:_MAX_BUFFERS])
                while left and sent >= len(left[0]):
                    sent -= len(left.pop(0))
                if sent:
                    left[0] = left[0][sent:]
        except OSError as error:
            self._lost(error)

    def receive_header(self, deadline: float | None) -> tuple[Header, int]:
        """The next frame's header and the bytes of its payload, which must be read next.

        Raises:
            ChannelLost: The peer is gone, sent something else than a frame, or nothing until the deadline.
        """
        lengths = bytearray(_LENGTHS.size)
        self.receive_into([memoryview(lengths)], deadline)
        head, payload = _LENGTHS.unpack(lengths)
        if head > _MAX_HEADER or payload > _MAX_PAYLOAD:
            self._lost(ValueError(f"a frame of {head} + {payload} bytes"))
        text = bytearray(head)
        self.receive_into([memoryview(text)], deadline)
        header: Header = json.loads(text)
        return header, payload

    def receive_into(self, views: Sequence[memoryview], deadline: float | None) -> None:
        """Fills the views, in order, from the stream."""
        try:
            for view in views:
                while len(view):
                    self._bound(deadline)
                    count = self._socket.recv_into(view)
                    if not count:
                        raise ConnectionResetError("the other side closed the connection")
                    view = view[count:]
        except OSError as error:
            self._lost(error)

    def receive(self, deadline: float | None) -> tuple[Header, Tensor]:
        """A whole frame; the payload as uint8."""
        header, size = self.receive_header(deadline)
        payload = torch.empty(size, dtype=torch.uint8)
        self.receive_into([raw(payload)], deadline)
        return header, payload

    def _bound(self, deadline: float | None) -> None:
        if deadline is None:
            self._socket.settimeout(None)
            return
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("no answer in time")
        self._socket.settimeout(left)

    def _lost(self, error: Exception) -> None:
        self.close()
        raise ChannelLost(str(error)) from error


def wait_readable(channels: Sequence[Channel], timeout_s: float) -> list[Channel]:
    """Those of the channels that have something to read, the end of the connection included."""
    poll = select.poll()
    by_number = {channel.fileno(): channel for channel in channels}
    for number in by_number:
        poll.register(number, select.POLLIN)
    return [by_number[number] for number, _ in poll.poll(max(0.0, timeout_s) * 1e3)]


class Server:
    """Answers messages, a thread for each connection.

    Args:
        handler: Called in the connection's thread. What it raises is its own bug and closes the connection.
        secret: What callers must show first.
        host: Where to listen besides the Unix socket.
    """

    def __init__(self, handler: Handler, secret: str, host: str = "127.0.0.1") -> None:
        self._handler = handler
        self._secret = secret
        path = Path(tempfile.gettempdir()) / f"moa-{uuid.uuid4().hex[:16]}.sock"
        unix = socket.socket(socket.AF_UNIX)
        unix.bind(str(path))
        path.chmod(0o600)
        unix.listen(128)
        tcp = socket.create_server((host, 0), backlog=128)
        self.address = Address(str(path), host, tcp.getsockname()[1])
        self._listeners = (unix, tcp)
        for listener in self._listeners:
            threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    def close(self) -> None:
        """Takes no more connections."""
        for listener in self._listeners:
            listener.close()
        with suppress(FileNotFoundError):
            os.unlink(self.address.path)

    def _accept(self, listener: socket.socket) -> None:
        with suppress(OSError):  # closed
            while True:
                sock, _ = listener.accept()
                threading.Thread(target=self._serve, args=(Channel(sock),), daemon=True).start()

    def _serve(self, channel: Channel) -> None:
        try:
            first, _ = channel.receive(time.monotonic() + _CONNECT_S)
            if not hmac.compare_digest(str(first.get("secret", "")), self._secret):
                return
            while True:
                header, payload = channel.receive(None)
                reply, tensor = self._handler(header, payload)
                del payload
                channel.send(reply, () if tensor is None else (raw(tensor),), time.monotonic() + 60)
        except ChannelLost:
            pass
        finally:
            channel.close()
