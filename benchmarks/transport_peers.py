"""The peers of the transport benchmark: a bare gRPC stream, and a round of Flower.

The bare stream is the least that moves a file over gRPC with mutual TLS: raw bytes, no protobuf, no hash, one fsync. The server
is a process of its own, and both ends write to one disk.

Flower runs its deployment engine, in an environment of its own that is made on demand: a SuperLink and SuperNodes on loopback,
in-memory state, subprocess isolation. Three things favour it: no TLS, no authentication, and nothing on disk.
"""

from __future__ import annotations

import argparse
import datetime
import ipaddress
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

HOST = "127.0.0.1"
ROOT = Path(__file__).resolve().parent.parent
MEGABYTE = 1_000_000
ADAPTER_BYTES = 64 * MEGABYTE
# One of these is the fastest for the bare stream, which one depends on the load; `--chunks` measures them all.
BARE_CHUNKS = (512 * 1024, 1024 * 1024)
CHUNKS = tuple(kib * 1024 for kib in (64, 128, 256, 512, 1024, 2048, 3072))

FLOWER = ("flwr==1.41.0", "numpy")
FLOWER_VENV = ROOT / ".venv-flower"
FLOWER_APP = Path(__file__).resolve().parent / "transport_flower"
# Of 4 MB, just below the 5 MiB in which Flower sends: none is faster. 256 arrays, as a real adapter has, take it twice as long.
FLOWER_ARRAYS = 16
FLOWER_LIMIT_S = 300.0


# A bare gRPC stream -----------------------------------------------------------------------------------------------------


def bare_grpc(num_bytes: int, chunk_bytes: int, folder: Path, repeats: int) -> dict[str, list[float]]:
    """Seconds of sending a payload to a server that stores it, and of receiving it into a file; every repeat.

    Args:
        num_bytes: Of the payload, random.
        chunk_bytes: Of one message.
        folder: Of the files of both ends.
        repeats: Of each direction, on one connection.

    Returns:
        `up_s` and `down_s`. Connecting is left out; each end's one fsync is not.
    """
    with bare_server(folder) as (port, credentials):
        return bare_times(port, credentials, os.urandom(num_bytes), chunk_bytes, folder / "received", repeats)


def bare_times(
    port: int, credentials: Any, payload: bytes, chunk_bytes: int, target: Path, repeats: int
) -> dict[str, list[float]]:
    """Both directions, measured at the client."""
    import grpc

    chunks = [payload[start : start + chunk_bytes] for start in range(0, len(payload), chunk_bytes)]
    times: dict[str, list[float]] = {"up_s": [], "down_s": []}
    with grpc.secure_channel(f"{HOST}:{port}", credentials, options=message_options()) as channel:
        grpc.channel_ready_future(channel).result(timeout=30)
        up, down = channel.stream_unary("/bare/up"), channel.unary_stream("/bare/down")
        for _ in range(repeats):
            fresh_pages(target.parent)
            start = time.perf_counter()
            stored = int(up(iter(chunks)))
            times["up_s"].append(time.perf_counter() - start)
            fresh_pages(target.parent)
            start = time.perf_counter()
            written = write(target, down(str(chunk_bytes).encode()))
            times["down_s"].append(time.perf_counter() - start)
            if stored != len(payload) or written != len(payload) or target.read_bytes() != payload:
                raise OSError(f"bare stream: expected {len(payload)} bytes, stored {stored}, received {written}")
    return times


def message_options() -> list[tuple[str, int]]:
    return [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]


def write(target: Path, chunks: Iterator[bytes]) -> int:
    """Chunks into a new file that is on the disk when this returns, in place of the last one; the number of bytes.

    A new one: to write over the pages of the last file is up to three times as fast, and no store of uploads could do so.
    """
    fresh = target.with_name(f"{target.name}.new")
    with fresh.open("wb", buffering=0) as file:
        written = sum(file.write(chunk) for chunk in chunks)
        os.fsync(file.fileno())
    os.replace(fresh, target)
    return written


def fresh_pages(folder: Path) -> None:
    """Leave the system pages that it has just freed: a virtual machine may have to ask its host for others, which costs as much
    as the transfer. Done before every transfer that is timed, ours and the bare stream's.
    """
    path, piece = folder / "pages", bytes(1024**2)
    with path.open("wb", buffering=0) as file:
        for _ in range(2 * ADAPTER_BYTES // len(piece)):
            file.write(piece)
    path.unlink()


def serve_bare(folder: Path) -> None:
    """The server's process: says its port, and serves until its input ends."""
    import grpc

    stored = folder / "stored"

    def up(chunks: Iterator[bytes], context: Any) -> bytes:
        return str(write(stored, chunks)).encode()

    def down(chunk_bytes: bytes, context: Any) -> Iterator[bytes]:
        with stored.open("rb", buffering=0) as file:
            while chunk := file.read(int(chunk_bytes)):
                yield chunk

    handlers = {"up": grpc.stream_unary_rpc_method_handler(up), "down": grpc.unary_stream_rpc_method_handler(down)}
    server = grpc.server(ThreadPoolExecutor(4), options=message_options())
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("bare", handlers)])
    key, certificate, root = ((folder / f"{name}.pem").read_bytes() for name in ("server-key", "server", "root"))
    port = server.add_secure_port(f"{HOST}:0", grpc.ssl_server_credentials([(key, certificate)], root, True))
    server.start()
    print(port, flush=True)
    sys.stdin.read()
    server.stop(None)


@contextmanager
def bare_server(folder: Path) -> Iterator[tuple[int, Any]]:
    """A bare server in a process of its own: its port, and the client's credentials."""
    import grpc

    folder.mkdir(parents=True, exist_ok=True)
    write_certificates(folder)
    command = [sys.executable, __file__, "--serve-bare", str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            port = int(process.stdout.readline())
            root, key, certificate = (
                (folder / f"{name}.pem").read_bytes() for name in ("root", "client-key", "client")
            )
            yield port, grpc.ssl_channel_credentials(root, key, certificate)
        finally:
            process.kill()


def write_certificates(folder: Path) -> None:
    """A root and two leaves, ECDSA on P-256, valid for an hour."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    now = datetime.datetime.now(datetime.UTC)
    names = {
        who: x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, who)]) for who in ("root", "server", "client")
    }
    keys = {who: ec.generate_private_key(ec.SECP256R1()) for who in names}
    for who, name in names.items():
        certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(names["root"])
            .public_key(keys[who].public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(minutes=5))
            .not_valid_after(now + datetime.timedelta(hours=1))
            .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(HOST))]), critical=False)
            .add_extension(x509.BasicConstraints(who == "root", None), critical=True)
            .sign(keys["root"], hashes.SHA256())
        )
        pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
        (folder / f"{who}.pem").write_bytes(certificate.public_bytes(pem))
        secret = keys[who].private_bytes(pem, pkcs8, serialization.NoEncryption())
        (folder / f"{who}-key.pem").write_bytes(secret)


# Flower -----------------------------------------------------------------------------------------------------------------


def flower_round(
    num_bytes: int, clients: int = 2, rounds: int = 3, poll_s: float = 0.0, arrays: int = FLOWER_ARRAYS
) -> list[float]:
    """Seconds of each round in which every client receives one adapter and returns another of its size.

    From before the messages are made until all replies are arrays in the server's memory, by the server's clock; without the
    start of Flower's processes, and without the mean.

    Args:
        num_bytes: Of the adapter, in float32 arrays; 0 is one number.
        clients: SuperNodes.
        rounds: One after the other, in one run.
        poll_s: How often the server asks for replies; 0 is Flower's own way, every 3 s. SuperNodes always ask every 3 s.
        arrays: That the adapter consists of.

    Raises:
        OSError: Flower did not finish, with the end of its logs.
    """
    prepare_flower()
    with tempfile.TemporaryDirectory(prefix="flower-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        output = folder / "rounds.json"
        config = (
            f'num-bytes={num_bytes} arrays={arrays} clients={clients} rounds={rounds} poll-s={poll_s} output="{output}"'
        )
        run_flower(folder, clients, config)
        if not output.exists():
            raise OSError(f"flower: expected {output.name} from its server app, got none\n{logs(folder)}")
        found = json.loads(output.read_text())
    if any(each["replies"] != clients for each in found):
        raise OSError(f"flower: expected {clients} replies a round, got {found}")
    return [float(each["exchange_s"]) for each in found]


def prepare_flower() -> None:
    """Make Flower's environment, unless it is there."""
    stamp = FLOWER_VENV / ".installed"
    wanted = " ".join(FLOWER)
    if stamp.exists() and stamp.read_text() == wanted:
        return
    subprocess.run([sys.executable, "-m", "venv", str(FLOWER_VENV)], check=True)
    pip = [str(FLOWER_VENV / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, *FLOWER], check=True)
    stamp.write_text(wanted)


def flower_environment(folder: Path) -> dict[str, str]:
    return {
        "PATH": f"{FLOWER_VENV / 'bin'}:/usr/bin:/bin",
        "HOME": str(folder),
        "FLWR_HOME": str(folder / "home"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
    }


def run_flower(folder: Path, clients: int, config: str) -> None:
    """One run of the app from start to end; nothing of Flower is alive afterwards."""
    end = time.monotonic() + FLOWER_LIMIT_S
    link, *ports = free_ports(1 + clients)
    shutil.copytree(FLOWER_APP, folder / "app", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "home").mkdir()
    where = f'[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "{HOST}:{link}"\ninsecure = true\n'
    (folder / "home" / "config.toml").write_text(where)
    superlink = ["flower-superlink", "--insecure", "--disable-runtime-dependency-installation", "--host", HOST]
    supernode = ["flower-supernode", "--insecure", "--superlink", f"{HOST}:{link}", "--host", HOST]
    processes: list[subprocess.Popen[bytes]] = []

    def start(name: str, command: list[str]) -> subprocess.Popen[bytes]:
        with (folder / f"{name}.log").open("wb") as log:
            program = str(FLOWER_VENV / "bin" / command[0])
            process = subprocess.Popen(
                [program, *command[1:]],
                env=flower_environment(folder),
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        processes.append(process)
        return process

    try:
        start("superlink", [*superlink, "--port", str(link)])
        wait_for_http(f"http://{HOST}:{link}/health", end, folder)
        for index, port in enumerate(ports):
            start(f"supernode-{index}", [*supernode, "--port", str(port)])
        # With --stream it ends when the run does.
        run = start("run", ["flwr", "run", str(folder / "app"), "here", "--stream", "-c", config])
        run.wait(max(1.0, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        raise OSError(f"flower: expected the run to end in {FLOWER_LIMIT_S:g} s\n{logs(folder)}") from None
    finally:
        end_all(processes, folder)


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on; all are held until all are found."""
    held = [socket.create_server((HOST, 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in held]
    for each in held:
        each.close()
    return ports


def wait_for_http(url: str, end: float, folder: Path) -> None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while time.monotonic() < end:
        with suppress(urllib.error.URLError, ConnectionError), opener.open(url, timeout=5):
            return
        time.sleep(0.2)
    raise OSError(f"flower: expected an answer from {url}\n{logs(folder)}")


def end_all(processes: list[subprocess.Popen[bytes]], folder: Path) -> None:
    """End the processes, their groups, and what they started in groups of its own: all that has this FLWR_HOME."""
    for process in processes:
        process.terminate()
    for process in processes:
        with suppress(subprocess.TimeoutExpired):
            process.wait(5)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    mark = f"FLWR_HOME={folder / 'home'}".encode()
    for _ in range(50):
        found = [one for one in Path("/proc").glob("[0-9]*") if mark in environment_of(one)]
        if not found:
            return
        for one in found:
            with suppress(ProcessLookupError):
                os.kill(int(one.name), signal.SIGKILL)
        time.sleep(0.1)


def environment_of(process: Path) -> list[bytes]:
    """What a process was started with; nothing where it has ended or is not ours."""
    with suppress(OSError):
        return (process / "environ").read_bytes().split(b"\0")
    return []


def logs(folder: Path) -> str:
    """The last lines of every log."""
    found = sorted(folder.glob("*.log"))
    return "\n".join(f"{log.name}:\n" + "\n".join(log.read_text(errors="replace").splitlines()[-15:]) for log in found)


# Report -----------------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description="The peers of the transport benchmark, as one JSON object.")
    parser.add_argument("--bytes", type=int, default=ADAPTER_BYTES, help="of the payload, and of Flower's adapter")
    parser.add_argument("--repeats", type=int, default=5, help="of the bare stream, each direction")
    parser.add_argument("--rounds", type=int, default=3, help="of Flower")
    parser.add_argument("--chunks", action="store_true", help="the bare stream with every chunk size, and no Flower")
    parser.add_argument("--folder", type=Path, default=ROOT / "benchmarks" / "cache", help="of the bare stream's files")
    parser.add_argument("--serve-bare", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve_bare:
        serve_bare(options.serve_bare)
        return
    options.folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {"bytes": options.bytes, "bare_grpc": {}}
    for chunk in CHUNKS if options.chunks else BARE_CHUNKS:
        with tempfile.TemporaryDirectory(prefix="bare-", dir=options.folder) as folder:
            found["bare_grpc"][chunk] = bare_grpc(options.bytes, chunk, Path(folder), options.repeats)
    if not options.chunks:
        found["flower_arrays"] = FLOWER_ARRAYS
        found["flower_round_s"] = flower_round(options.bytes, rounds=options.rounds)
        found["flower_round_fast_poll_s"] = flower_round(options.bytes, rounds=options.rounds, poll_s=0.1)
        found["flower_empty_round_s"] = flower_round(0, rounds=options.rounds)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
