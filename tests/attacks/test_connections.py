"""Attack: connections that say nothing, certificates that are not in the run, and clients of the run that open all they can."""

from __future__ import annotations

import contextlib
import json
import resource
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from lamina.protos import coordinator_pb2 as pb
from lamina.protos import identity as identities
from lamina.protos.clock import SYSTEM
from lamina.protos.link import Address, Link
from lamina.server.port import listen
from tests import deployment
from tests.deployment import NAMES
from tests.e2e.faults.scene import Gated, Scene, until
from tests.hostile import Hostile, end, eventually

STRANGER = "stranger"


def test_idle_connections_take_no_files_from_a_run(tmp_path: Path) -> None:
    """Four times as many as the process may have files; the sites were there before."""
    limits = "import resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (64, 128)); "
    begin = limits + "from lamina.__main__ import main; sys.exit(main(sys.argv[1:]))"
    hold = threading.Event()
    with Scene(tmp_path, ["evaluate.every=1000"]) as it, contextlib.ExitStack() as stack:
        listens, output = f"coordinator.listen=127.0.0.1:{it.port}", f"output={it.path}"
        process = deployment.start("-c", begin, "coordinator", "--json", *it.words, listens, output, log=it.log)
        it.processes.append(process)
        deployment.wait_for(it.log, "listening")
        assert resource.prlimit(process.pid, resource.RLIMIT_NOFILE) == (128, 128)
        workers = {name: Gated(name, gates={1: hold}) for name in NAMES}
        for name in NAMES:
            it.site(name, workers[name])
        until(lambda: all(one.begun for one in workers.values()), "all train")
        for _ in range(512):
            with contextlib.suppress(OSError):
                stack.enter_context(socket.create_connection(("127.0.0.1", it.port), 5))
        hold.set()
        it.ended(process, 0)
        it.sites_ended()
        it.undisturbed()


def test_a_connection_that_says_nothing_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listen, "_HANDSHAKE_MS", 300)
    with secure(tmp_path) as (who, running):
        for said in (b"", b"\x16\x03\x01\x02\x00"):
            with socket.create_connection(("127.0.0.1", running.port), 30) as silent:
                silent.sendall(said)
                assert silent.recv(100) == b""
        north = Hostile("north", running.port, who["north"], tmp_path / "north")
        assert north.register()["client_id"] == "north"
        north.close()


@contextlib.contextmanager
def secure(folder: Path, *more: str) -> Iterator[tuple[dict[str, Path], deployment.Running]]:
    """A coordinator of three sites, and everyone's certificates; one is in the consortium and not in the run."""
    who = deployment.certificates(folder / "pki", (*NAMES, STRANGER))
    spec_file = folder / "spec.json"
    spec_file.write_text(deployment.spec().to_json())
    words = deployment.words(spec_file, f"coordinator.identity={who['coordinator']}", *more)
    with deployment.coordinator(folder / "run", words) as running:
        try:
            yield who, running
        finally:
            end(running, who["op"])


def test_a_client_that_is_not_in_the_run_reaches_no_method(tmp_path: Path) -> None:
    with secure(tmp_path) as (who, running):
        stranger = Hostile(STRANGER, running.port, who[STRANGER], tmp_path / STRANGER)
        signed = stranger.statement("register", {})
        found = {
            "Register": stranger.call("Register", signed),
            "Instructions": stranger.call_stream("Instructions", pb.InstructionsRequest(run_id="?")),
            "Heartbeat": stranger.call("Heartbeat", pb.HeartbeatRequest()),
            "Download": stranger.call_stream("Download", pb.DownloadRequest(sha256="?")),
            "Upload": stranger.send([pb.UploadPart(claim=signed)]),
            "Report": stranger.call("Report", signed),
        }
        stranger.close()
        for method, said in found.items():
            assert said.startswith("FAILED_PRECONDITION: client stranger: expected one of the run's clients."), method
            assert "Add it to clients.names at the coordinator" in said, method


def test_clients_of_the_run_together_shut_out_nobody(tmp_path: Path) -> None:
    """Each opens as many streams as it can and reads none; everyone's next call is answered."""
    with secure(tmp_path) as (who, running):
        sites = [Hostile(name, running.port, who[name], tmp_path / name) for name in NAMES]
        operator = Link(Address(f"127.0.0.1:{running.port}", identities.load(who["op"]), "op", "operator"), SYSTEM)
        for site in sites:
            site.register()
        streams = [site.link.stub.Instructions(pb.InstructionsRequest(run_id="?")) for _ in range(60) for site in sites]
        eventually(lambda: sum(one.is_active() for one in streams) <= len(sites))
        assert json.loads(operator.call("Status", pb.StatusRequest()).json)["state"]
        for site in sites:
            eventually(lambda: site.call("Heartbeat", pb.HeartbeatRequest()) == "OK")  # noqa: B023
            assert site.register()["client_id"] == site.name
        for one in streams:
            one.cancel()
        for site in sites:
            site.close()
        operator.close()


def test_streams_that_nobody_registered_for_end(tmp_path: Path) -> None:
    with secure(tmp_path) as (who, running):
        north = Hostile("north", running.port, who["north"], tmp_path / "north")
        said = north.call_stream("Instructions", pb.InstructionsRequest(run_id="?"))
        assert said.startswith("UNAVAILABLE: north has not registered, or has left since.")
        north.close()
