"""A TCP proxy on loopback for fault tests: it cuts, partitions, slows, stalls and drops what goes through it."""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from types import TracebackType
from typing import Self, TypeVar

HOST = "127.0.0.1"
PIECE_BYTES = 16 * 1024
# Small, so that a sender notices a link that does not move: a kernel's buffers may otherwise hold megabytes.
BUFFER_BYTES = 64 * 1024
# A slow link lets through what belongs to this much time at once.
QUANTUM_S = 0.02
CONTROL_TIMEOUT_S = 10.0
RESET_ON_CLOSE = struct.pack("ii", 1, 0)
UP, DOWN = 0, 1

T = TypeVar("T")


class _DroppedError(Exception):
    """The connection has carried the last byte that `drop_after` allows."""


class Proxy:
    """Listens on `port` and forwards to `target_port`; up is from the client to the server.

    Controls may be called from any thread, and have taken effect when they return. What they do lasts until `heal`. Bytes
    that are already in a kernel's buffer on the way out still arrive.
    """

    def __init__(self, target_port: int) -> None:
        self.target_port = target_port
        self.port = 0
        self.connections = 0
        self._forwarded = [0, 0]
        self._rate: float | None = None
        self._free_at = [0.0, 0.0]
        self._stall_left: int | None = None
        self._drop_left: int | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._listening = False

    @property
    def bytes_up(self) -> int:
        """Bytes forwarded to the server so far."""
        return self._forwarded[UP]

    @property
    def bytes_down(self) -> int:
        """Bytes forwarded to clients so far."""
        return self._forwarded[DOWN]

    def __enter__(self) -> Self:
        self._loop = asyncio.new_event_loop()
        self._flowing = asyncio.Event()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._thread.start()
        self._listener = bound(0)
        self.port = self._listener.getsockname()[1]
        self.heal()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cut()
        self._listener.close()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(CONTROL_TIMEOUT_S)
        self._loop.close()

    # Controls ---------------------------------------------------------------------------------------------------------

    def cut(self) -> None:
        """Reset every open connection and refuse new ones."""
        self._do(self._cut())

    def silence(self) -> None:
        """A partition: connections stay open and new ones are accepted, but nothing passes, an end or a reset included."""
        self._now(self._flowing.clear)

    def slow(self, bytes_per_s: float) -> None:
        """Let each direction pass this much, all its connections together, in small even pieces."""
        if bytes_per_s <= 0:
            raise ValueError(f"bytes_per_s: expected more than 0, got {bytes_per_s}; use silence() for none at all")
        self._now(lambda: setattr(self, "_rate", bytes_per_s))

    def stall_after(self, n_bytes: int) -> None:
        """Become silent when this many more bytes have gone up, over all connections."""
        self._now(lambda: setattr(self, "_stall_left", positive(n_bytes)))

    def drop_after(self, n_bytes: int) -> None:
        """Kill the connection that carries the last of this many more bytes up; once, the others and new ones live.

        The client sees a reset. The server receives every one of these bytes and then the end; what it answers is lost.
        """
        self._now(lambda: setattr(self, "_drop_left", positive(n_bytes)))

    def heal(self) -> None:
        """An ordinary link again; what was held back passes now."""
        self._now(self._heal)

    def _do(self, coroutine: Coroutine[object, object, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(CONTROL_TIMEOUT_S)

    def _now(self, call: Callable[[], object]) -> None:
        async def called() -> None:
            call()

        self._do(called())

    def _heal(self) -> None:
        self._rate = self._stall_left = self._drop_left = None
        if not self._listening:
            self._listener.listen(128)
            self._loop.add_reader(self._listener, self._accept)
            self._listening = True
        self._flowing.set()

    async def _cut(self) -> None:
        if self._listening:
            self._loop.remove_reader(self._listener)
            self._listener.close()
            # Bound but not listening: the port stays ours, and whoever connects is refused.
            self._listener = bound(self.port)
            self._listening = False
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # Connections ------------------------------------------------------------------------------------------------------

    def _accept(self) -> None:
        try:
            client, _ = self._listener.accept()
        except (BlockingIOError, ConnectionError):
            return
        self.connections += 1
        task = self._loop.create_task(self._serve(client))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        # A task that is cancelled before its first step closes nothing itself.
        task.add_done_callback(lambda _: client.close())

    async def _serve(self, client: socket.socket) -> None:
        server = made()
        client.setblocking(False)
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for end in (client, server):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
        try:
            await self._flowing.wait()
            await self._loop.sock_connect(server, (HOST, self.target_port))
            async with asyncio.TaskGroup() as pumps:
                pumps.create_task(self._pump(client, server, UP))
                pumps.create_task(self._pump(server, client, DOWN))
            gentle(client)
            gentle(server)
        except* _DroppedError:
            client.close()
            with suppress(OSError):
                server.shutdown(socket.SHUT_WR)
                while await self._loop.sock_recv(server, PIECE_BYTES):
                    pass
        except* OSError:
            pass
        finally:
            client.close()
            server.close()

    async def _pump(self, source: socket.socket, sink: socket.socket, direction: int) -> None:
        while data := await self._whole_link(self._loop.sock_recv(source, PIECE_BYTES)):
            rest = memoryview(data)
            while rest:
                allowed, last = await self._allowance(len(rest), direction)
                await self._loop.sock_sendall(sink, rest[:allowed])
                self._forwarded[direction] += allowed
                rest = rest[allowed:]
                if last:
                    raise _DroppedError
        await self._flowing.wait()
        sink.shutdown(socket.SHUT_WR)

    async def _whole_link(self, receiving: Awaitable[bytes]) -> bytes:
        """What is received; a reset too waits until the link is whole."""
        try:
            return await receiving
        except OSError:
            await self._flowing.wait()
            raise

    async def _allowance(self, wanted: int, direction: int) -> tuple[int, bool]:
        """How many bytes may be sent now, once any may, and whether the connection dies after them."""
        await self._flowing.wait()
        if self._rate is not None:
            wanted = min(wanted, max(1, int(self._rate * QUANTUM_S)))
            start = max(self._free_at[direction], self._loop.time() - QUANTUM_S)
            self._free_at[direction] = start + wanted / self._rate
            await asyncio.sleep(start - self._loop.time())
            await self._flowing.wait()
        last = False
        if direction == UP and self._drop_left is not None:
            wanted = min(wanted, self._drop_left)
        if direction == UP and self._stall_left is not None:
            wanted = min(wanted, self._stall_left)
            self._stall_left -= wanted
            if not self._stall_left:
                self._stall_left = None
                self._flowing.clear()
        if direction == UP and self._drop_left is not None:
            self._drop_left -= wanted
            if not self._drop_left:
                self._drop_left, last = None, True
        return wanted, last


def made() -> socket.socket:
    """A TCP socket with small buffers that does not block."""
    one = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_BYTES)
    one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES)
    one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    one.setblocking(False)
    return one


def bound(port: int) -> socket.socket:
    """A socket that holds a port; 0 picks one."""
    one = made()
    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    one.bind((HOST, port))
    return one


def gentle(end: socket.socket) -> None:
    """Closing will send what is buffered and an end, not a reset."""
    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 0, 0))


def positive(n_bytes: int) -> int:
    if n_bytes < 1:
        raise ValueError(f"n_bytes: expected at least 1, got {n_bytes}; use silence() or cut() for now")
    return n_bytes
