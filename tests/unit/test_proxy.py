"""The proxy of the fault tests, in front of a server that sends back what it receives."""

from __future__ import annotations

import errno
import itertools
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from tests.proxy import HOST, Proxy

PATIENCE_S = 10.0
MOMENT_S = 0.15


class Echo:
    """Sends back every byte; remembers what each connection brought, and how it ended."""

    def __init__(self) -> None:
        self.received: list[bytearray] = []
        self.ends: list[str] = []
        self._listener = socket.create_server((HOST, 0))
        self._listener.settimeout(0.05)
        self.port: int = self._listener.getsockname()[1]
        self._closing = threading.Event()
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        while not self._closing.is_set():
            try:
                connection, _ = self._listener.accept()
            except TimeoutError:
                continue
            connection.settimeout(PATIENCE_S)
            self.received.append(bytearray())
            thread = threading.Thread(target=self._echo, args=(connection, self.received[-1]))
            self._threads.append(thread)
            thread.start()

    def _echo(self, connection: socket.socket, received: bytearray) -> None:
        with connection:
            try:
                while data := connection.recv(65536):
                    received += data
                    connection.sendall(data)
                self.ends.append("end")
            except ConnectionError:
                self.ends.append("reset")

    def close(self) -> None:
        self._closing.set()
        for thread in self._threads:
            thread.join(PATIENCE_S)
        self._listener.close()


@pytest.fixture
def echo() -> Iterator[Echo]:
    server = Echo()
    yield server
    server.close()


@pytest.fixture
def proxy(echo: Echo) -> Iterator[Proxy]:
    with Proxy(echo.port) as made:
        yield made


def connected(proxy: Proxy) -> socket.socket:
    return socket.create_connection((HOST, proxy.port), timeout=PATIENCE_S)


def read(connection: socket.socket, size: int) -> bytes:
    got = b""
    while len(got) < size:
        data = connection.recv(size - len(got))
        assert data, f"the connection ended after {len(got)} of {size} bytes"
        got += data
    return got


def outcome(connection: socket.socket, data: bytes) -> str:
    """How sending this and reading until the end went."""
    try:
        connection.sendall(data)
        while connection.recv(65536):
            pass
    except ConnectionError:
        return "reset"
    return "end"


def quiet(connection: socket.socket) -> bool:
    """Nothing arrives for a moment, and the connection is open."""
    connection.settimeout(MOMENT_S)
    try:
        connection.recv(1)
    except TimeoutError:
        return True
    finally:
        connection.settimeout(PATIENCE_S)
    return False


def eventually(holds: Callable[[], bool]) -> bool:
    end = time.monotonic() + PATIENCE_S
    while not holds() and time.monotonic() < end:
        time.sleep(0.005)
    return holds()


def pattern(size: int) -> bytes:
    return bytes(itertools.islice(itertools.cycle(range(251)), size))


def test_it_forwards_and_counts(echo: Echo, proxy: Proxy) -> None:
    sent = pattern(400_000)
    with connected(proxy) as one, connected(proxy) as two:
        writer = threading.Thread(target=one.sendall, args=(sent,))
        writer.start()
        assert read(one, len(sent)) == sent
        writer.join()
        two.sendall(b"two")
        assert read(two, 3) == b"two"
    # The last piece is counted a moment after it may be read.
    assert eventually(lambda: proxy.bytes_down == len(sent) + 3)
    assert proxy.bytes_up == len(sent) + 3
    assert proxy.connections == 2


def test_an_end_passes_and_leaves_the_other_direction_open(echo: Echo, proxy: Proxy) -> None:
    with connected(proxy) as one:
        one.sendall(b"last words")
        one.shutdown(socket.SHUT_WR)
        assert read(one, 10) == b"last words"
        assert one.recv(1) == b""
    assert eventually(lambda: echo.ends == ["end"])


def test_cut_resets_and_refuses_until_healed(echo: Echo, proxy: Proxy) -> None:
    with connected(proxy) as one:
        one.sendall(b"x")
        read(one, 1)
        proxy.cut()
        with pytest.raises(ConnectionResetError):
            one.recv(1)
    assert eventually(lambda: echo.ends == ["reset"])
    for _ in range(2):
        with pytest.raises(ConnectionRefusedError):
            connected(proxy)
        proxy.cut()
    port = proxy.port
    proxy.heal()
    with connected(proxy) as one:
        one.sendall(b"y")
        assert read(one, 1) == b"y"
    assert (proxy.port, proxy.connections) == (port, 2)


def test_silence_keeps_connections_and_forwards_nothing(echo: Echo, proxy: Proxy) -> None:
    with connected(proxy) as before:
        before.sendall(b"a")
        assert read(before, 1) == b"a"
        proxy.silence()
        before.sendall(b"b")
        with connected(proxy) as during, connected(proxy) as left:
            during.sendall(b"c")
            left.close()
            assert quiet(before)
            assert quiet(during)
            assert [bytes(each) for each in echo.received] == [b"a"]
            assert (proxy.bytes_up, proxy.bytes_down) == (1, 1)
            proxy.heal()
            assert read(before, 1) == b"b"
            assert read(during, 1) == b"c"


@pytest.mark.parametrize("reset", [True, False])
def test_an_end_during_silence_arrives_after_it(echo: Echo, proxy: Proxy, reset: bool) -> None:
    one = connected(proxy)
    one.sendall(b"a")
    read(one, 1)
    proxy.silence()
    if reset:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    one.close()
    time.sleep(MOMENT_S)
    assert echo.ends == []
    proxy.heal()
    assert eventually(lambda: echo.ends == ["reset" if reset else "end"])


def test_a_sender_into_silence_is_held_up(proxy: Proxy) -> None:
    with connected(proxy) as one:
        one.sendall(b"a")
        read(one, 1)
        proxy.silence()
        one.settimeout(MOMENT_S)
        with pytest.raises(TimeoutError):
            one.sendall(bytes(16 * 1024 * 1024))


def test_slow_limits_each_direction(proxy: Proxy) -> None:
    sent, rate = pattern(10_000), 40_000
    proxy.slow(rate)
    start = time.monotonic()
    with connected(proxy) as one:
        one.sendall(sent)
        first = one.recv(len(sent))
        assert first + read(one, len(sent) - len(first)) == sent
        # All pieces but the first two and the last wait, whatever the machine does meanwhile.
        assert time.monotonic() - start > 0.7 * len(sent) / rate
        assert len(first) < len(sent) / 2
        proxy.heal()
        one.sendall(sent)
        assert read(one, len(sent)) == sent


def test_slow_is_shared_by_connections(proxy: Proxy) -> None:
    proxy.slow(40_000)
    start = time.monotonic()
    with connected(proxy) as one, connected(proxy) as two:
        for each in (one, two):
            each.sendall(bytes(4_000))
        for each in (one, two):
            read(each, 4_000)
    assert time.monotonic() - start > 0.7 * 8_000 / 40_000


def test_stall_after_counts_over_connections(echo: Echo, proxy: Proxy) -> None:
    sent = pattern(100_000)
    with connected(proxy) as one, connected(proxy) as two:
        one.sendall(sent[:1000])
        read(one, 1000)
        proxy.stall_after(50_000)
        two.sendall(sent[:20_000])
        read(two, 20_000)
        one.sendall(sent)
        assert eventually(lambda: proxy.bytes_up == 51_000)
        assert eventually(lambda: sum(map(len, echo.received)) == 51_000)
        before = proxy.bytes_down
        two.sendall(b"x")
        assert quiet(two)
        assert (proxy.bytes_up, proxy.bytes_down) == (51_000, before)
        proxy.heal()
        assert read(one, len(sent)) == sent
        assert read(two, 1) == b"x"


def test_drop_after_kills_one_connection_once(echo: Echo, proxy: Proxy) -> None:
    sent = pattern(100_000)
    with connected(proxy) as one, connected(proxy) as other:
        other.sendall(b"x")
        read(other, 1)
        proxy.drop_after(30_000)
        assert outcome(one, sent) == "reset"
        assert eventually(lambda: echo.ends == ["end"])
        assert proxy.bytes_up == 30_001
        assert sorted(len(each) for each in echo.received) == [1, 30_000]
        other.sendall(b"y")
        assert read(other, 1) == b"y"
    with connected(proxy) as again:
        again.sendall(sent[:40_000])
        assert read(again, 40_000) == sent[:40_000]


def test_a_server_that_is_away_and_back(echo: Echo) -> None:
    echo.close()
    with Proxy(echo.port) as proxy:
        with pytest.raises(ConnectionResetError), connected(proxy) as one:
            one.recv(1)
        with socket.create_server((HOST, echo.port)) as server, connected(proxy) as one:
            there, _ = server.accept()
            with there:
                there.sendall(b"back")
                assert read(one, 4) == b"back"


def test_leaving_closes_everything(echo: Echo) -> None:
    with Proxy(echo.port) as proxy:
        one = connected(proxy)
        one.sendall(b"a")
        read(one, 1)
        proxy.silence()
    with one, pytest.raises(ConnectionResetError):
        one.recv(1)
    with pytest.raises(OSError) as failed:
        connected(proxy).close()
    assert failed.value.errno == errno.ECONNREFUSED
    assert not any(thread.name == "proxy" for thread in threading.enumerate())


def test_bad_controls(proxy: Proxy) -> None:
    with pytest.raises(ValueError, match="bytes_per_s: expected more than 0"):
        proxy.slow(0)
    for control in (proxy.stall_after, proxy.drop_after):
        with pytest.raises(ValueError, match="n_bytes: expected at least 1"):
            control(0)
