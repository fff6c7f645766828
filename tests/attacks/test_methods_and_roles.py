"""Attack: every method of the port by everyone who should not call it. A method without a row in the table fails."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2

from lamina.protos import coordinator_pb2 as pb
from lamina.protos import identity as identities
from lamina.protos import statements as st
from lamina.protos.clock import SYSTEM
from lamina.protos.link import Address, Link
from lamina.server.port.access import METHOD_ROLES, Access, Caller
from tests import consortium, deployment
from tests.hostile import Hostile, encoded, end, eventually, no_exception_in_a_handler

SERVICE = "/lamina.v1.Coordinator/"
HEALTH = "/grpc.health.v1.Health/"
ROLES = ("coordinator", "client", "operator", "auditor")
# Method -> who may call it. Written by hand, not taken from the code that it checks.
ALLOWED: Mapping[str, tuple[str, ...]] = {
    SERVICE + "Register": ("client",),
    SERVICE + "Instructions": ("client",),
    SERVICE + "Heartbeat": ("client",),
    SERVICE + "Download": ("client",),
    SERVICE + "Upload": ("client",),
    SERVICE + "Report": ("client",),
    SERVICE + "Mask": ("client",),
    SERVICE + "Status": ("operator", "auditor"),
    SERVICE + "Watch": ("operator", "auditor"),
    SERVICE + "Pause": ("operator",),
    SERVICE + "Stop": ("operator",),
    SERVICE + "ListFiles": ("operator", "auditor"),
    SERVICE + "Fetch": ("operator", "auditor"),
    HEALTH + "Check": ROLES,
    HEALTH + "Watch": ROLES,
}
NAMES = {"coordinator": "coordinator", "client": "north", "operator": "op", "auditor": "aud"}
# What a method answers to one who may call it and says nothing sensible.
REFUSED = (grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED)


@dataclass
class Port:
    """A running coordinator and everyone's certificates."""

    running: deployment.Running
    who: dict[str, Path]
    words: list[str]


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Port]:
    folder = tmp_path_factory.mktemp("port")
    who = deployment.certificates(folder / "pki", ("north", "south", "west", "gone"))
    consortium.revoked(who["ca"], "gone")
    spec_file = folder / "spec.json"
    spec_file.write_text(deployment.spec().to_json())
    words = deployment.words(
        spec_file, f"coordinator.identity={who['coordinator']}", f"coordinator.revocations={who['ca'] / 'crl.pem'}"
    )
    with deployment.coordinator(folder / "run", words) as running:
        yield Port(running, who, words)
        end(running, who["op"])


def descriptors() -> dict[str, Any]:
    """Every method of both services, by full name."""
    services = (pb.DESCRIPTOR.services_by_name["Coordinator"], health_pb2.DESCRIPTOR.services_by_name["Health"])
    return {f"/{one.full_name}/{method.name}": method for one in services for method in one.methods}


def channel(port: Port, identity: Path | None) -> grpc.Channel:
    target = f"127.0.0.1:{port.running.port}"
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0)]
    if identity is None:
        ca = (port.who["ca"] / "ca.pem").read_bytes()
        return grpc.secure_channel(target, grpc.ssl_channel_credentials(ca), options)
    mine = identities.load(identity)
    credentials = grpc.ssl_channel_credentials(mine.ca_pem, mine.tls_key_pem, mine.certificate_pem)
    return grpc.secure_channel(target, credentials, options)


def called(over: grpc.Channel, method: str) -> grpc.StatusCode | None:
    """The status of a call with an empty message; None for an answer."""
    empty = b""
    kind = descriptors()[method]
    if kind.client_streaming:
        answers = over.stream_stream(method)(iter([empty]), timeout=20)
    elif kind.server_streaming:
        answers = over.unary_stream(method)(empty, timeout=1.5 if "Watch" in method or "Instr" in method else 20)
    else:
        answers = None
    try:
        if answers is None:
            over.unary_unary(method)(empty, timeout=20)
        else:
            next(iter(answers), None)
            answers.cancel()
    except grpc.RpcError as error:
        code: grpc.StatusCode = error.code()
        return code
    return None


def test_the_table_is_the_port() -> None:
    assert set(ALLOWED) == set(descriptors())
    assert {name: tuple(sorted(roles)) for name, roles in METHOD_ROLES.items()} == {
        name: tuple(sorted(roles)) for name, roles in ALLOWED.items()
    }


@pytest.mark.parametrize("role", ROLES)
def test_every_method_by_every_role(port: Port, role: str, caplog: pytest.LogCaptureFixture) -> None:
    with no_exception_in_a_handler(caplog), channel(port, port.who[NAMES[role]]) as over:
        found = {method: called(over, method) for method in ALLOWED if not method.endswith("Stop")}
        passed = {method for method, code in found.items() if code not in REFUSED}
        assert passed == {method for method, roles in ALLOWED.items() if role in roles and method in found}
        denied = {code for method, code in found.items() if method not in passed}
        assert denied <= {grpc.StatusCode.PERMISSION_DENIED}
        assert None in found.values() or role == "client"
        if role != "operator":  # who may: the fixture's end
            assert called(over, SERVICE + "Stop") == grpc.StatusCode.PERMISSION_DENIED
        unimplemented = over.unary_unary(SERVICE + "Shutdown")
        with pytest.raises(grpc.RpcError) as caught:
            unimplemented(b"", timeout=20)
        assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED


def test_every_method_by_a_client_that_was_revoked(port: Port, caplog: pytest.LogCaptureFixture) -> None:
    with no_exception_in_a_handler(caplog), channel(port, port.who["gone"]) as over:
        assert {called(over, method) for method in ALLOWED} == {grpc.StatusCode.UNAUTHENTICATED}


def without(port: Port, tmp_path: Path) -> dict[str, grpc.Channel]:
    """Channels of those who have no certificate of our CA."""
    target, ca = f"127.0.0.1:{port.running.port}", (port.who["ca"] / "ca.pem").read_bytes()
    foreign = deployment.certificates(tmp_path / "foreign", ("north",))
    theirs = identities.load(foreign["north"])
    stolen = grpc.ssl_channel_credentials(ca, theirs.tls_key_pem, theirs.certificate_pem)
    options = [("grpc.enable_retries", 0)]
    return {
        "no certificate": channel(port, None),
        "another CA": grpc.secure_channel(target, stolen, options),
        "no TLS": grpc.insecure_channel(target, options),
    }


def test_no_method_is_reached_without_a_certificate_of_our_ca(
    port: Port, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached: list[str] = []
    check = Access.check

    def noted(self: Access, method: str, context: Any) -> Caller:
        reached.append(method)
        return check(self, method, context)

    monkeypatch.setattr(Access, "check", noted)
    for name, over in without(port, tmp_path).items():
        with over:
            found = {called(over, method) for method in ALLOWED}
            assert found == {grpc.StatusCode.UNAVAILABLE}, name
    assert reached == []
    with channel(port, port.who["aud"]) as over:
        assert called(over, SERVICE + "Status") is None
    assert reached == [SERVICE + "Status"]


# --- nothing else listens -----------------------------------------------------------------------------------------------------


def listening(pid: int) -> set[int]:
    """Ports on which a process listens, from /proc."""
    inodes = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            found = re.fullmatch(r"socket:\[(\d+)\]", os.readlink(entry))
        except OSError:
            continue
        if found:
            inodes.add(found[1])
    ports = set()
    for table in ("tcp", "tcp6", "udp", "udp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            words = line.split()
            if words[9] in inodes and (words[3] == "0A" or table.startswith("udp")):
                ports.add(int(words[1].rpartition(":")[2], 16))
    return ports


def test_the_look_at_listening_ports_sees_one() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert server.getsockname()[1] in listening(os.getpid())


@pytest.mark.parametrize("metrics", [False, True])
def test_one_port_and_no_other(port: Port, tmp_path: Path, metrics: bool) -> None:
    main, other = deployment.free_port(), deployment.free_port()
    more = [f"coordinator.metrics=127.0.0.1:{other}"] if metrics else []
    log = tmp_path / "log"
    process = deployment.start_coordinator(tmp_path / "run", main, [*port.words, *more], log)
    try:
        deployment.wait_for(log, "listening")
        wanted = {main, *([other] if metrics else [])}
        eventually(lambda: listening(process.pid) >= wanted)  # the second opens a moment later
        assert listening(process.pid) == wanted
        # It listens where it was told to, and not on every interface.
        with pytest.raises(OSError, match="refused"):
            socket.create_connection(("127.0.0.2", main), timeout=5).close()
    finally:
        process.terminate()
        try:
            assert process.wait(30) == 0
        except subprocess.TimeoutExpired:
            deployment.kill(process)
            raise


# --- a client among clients ------------------------------------------------------------------------------------------


@pytest.fixture
def three(tmp_path: Path) -> Iterator[tuple[dict[str, Hostile], deployment.Running, dict[str, Path]]]:
    """An open round with three raw clients of unequal rank, so that their releases are different blobs."""
    who = deployment.certificates(tmp_path / "pki")
    spec_file = tmp_path / "spec.json"
    spec_file.write_text(deployment.spec().to_json())
    words = deployment.words(spec_file, f"coordinator.identity={who['coordinator']}", "keep_updates=true", "rounds=2")
    with deployment.coordinator(tmp_path / "run", words) as running:
        found = {n: Hostile(n, running.port, who[n], tmp_path / n) for n in deployment.NAMES}
        for one in found.values():
            one.register()
        yield found, running, who
        for one in found.values():
            one.close()
        end(running, who["op"])


def test_a_client_among_clients(
    three: tuple[dict[str, Hostile], deployment.Running, dict[str, Path]],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    sites, running, _ = three
    north, south = sites["north"], sites["south"]
    contents = {}
    with no_exception_in_a_handler(caplog):
        for name, site in sites.items():
            asked = site.instruction(round_number=1)
            contents[name] = encoded(site.honest(asked))
            assert site.upload(site.statement(st.CLAIM, site.claim(asked, contents[name])), contents[name]) == "stored"
        asked = {name: site.instruction(round_number=2) for name, site in sites.items()}
        mine, others = asked["north"]["release"][0], asked["south"]["release"][0]
        assert mine != others
        # Its own release and the schema, and no other blob that is there.
        assert north.call_stream("Download", pb.DownloadRequest(sha256=mine)) == "OK"
        assert south.call_stream("Download", pb.DownloadRequest(sha256=others)) == "OK"
        names = {path.name for path in (running.path / "blobs").glob("??/*")}
        assert {others, mine, north.terms["spec"][0]} < names
        for name in [
            *(names - {mine, north.terms["spec"][0]}),
            "",
            "../../ca.pem",
            "partial",
            "0" * 64,
            f"../{others[:2]}/{others}",
        ]:
            assert north.call_stream("Download", pb.DownloadRequest(sha256=name)).startswith("NOT_FOUND"), name
        # In another's name, with one's own signature and with the other's.
        content = encoded(south.honest(asked["south"]))
        as_south = south.claim(asked["south"], content)
        assert north.upload(north.statement(st.CLAIM, as_south), content).startswith("INVALID_ARGUMENT: wrong-client")
        assert north.upload(south.statement(st.CLAIM, as_south), content).startswith("INVALID_ARGUMENT: signature")
        about = {"run_id": asked["south"]["run_id"], "round": 2, "instruction": "train"}
        failure = {"kind": "failure", "client_id": "south", "code": "disk", **about}
        assert north.call("Report", south.statement(st.REPORT, failure)).startswith("INVALID_ARGUMENT: signature")
        # The certificate, not the statement, says who has failed: north, who thereby harms itself alone.
        assert north.call("Report", north.statement(st.REPORT, failure)) == "OK"
        register = {"kind": "register", "versions": [1], "rank": None, "held": -1, "run_id": "", "client_id": "south"}
        assert north.register(client_id="south")["client_id"] == "north"
        assert north.call("Register", south.statement(st.REGISTER, register)).startswith("INVALID_ARGUMENT: signature")
        assert south.upload(south.statement(st.CLAIM, as_south), content) == "stored"
        fetching = north.call_stream("Fetch", pb.FetchRequest(name="config.yaml"))
        assert fetching.startswith("PERMISSION_DENIED")
    events = (running.path / "events.jsonl").read_text().splitlines()
    round_two = [line for line in events if '"round":2' in line]
    assert not [line for line in round_two if '"kind":"reject"' in line and '"client_id":"south"' in line]
    assert len([line for line in round_two if '"kind":"received"' in line and '"client_id":"south"' in line]) == 1


NAMES_BEYOND = [
    "", ".", "..", "/", "/etc/passwd", "../pki/ca/ca.key", "adapter/../../pki/ca/ca.key", "rounds.jsonl/../config.yaml",
    "adapter/../config.yaml", "./config.yaml", "config.yaml/", "config.yaml\0", "CONFIG.YAML", "coordinator.sqlite",
    "coordinator.sqlite-wal", "blobs", "blobs/partial", "checkpoints/round-0001/state.json", "adapter", "latest/../ca.pem",
    "link.yaml", "adapter/link", "*", "rounds/*/*.safetensors", "a" * 60_000,
]  # fmt: skip


def test_fetch_gives_what_is_listed_and_nothing_beyond(
    three: tuple[dict[str, Hostile], deployment.Running, dict[str, Path]], caplog: pytest.LogCaptureFixture
) -> None:
    sites, running, who = three
    for site in sites.values():
        asked = site.instruction(round_number=1)
        content = encoded(site.honest(asked))
        assert site.upload(site.statement(st.CLAIM, site.claim(asked, content)), content) == "stored"
    sites["north"].instruction(round_number=2)
    # An operator's mistake beside the adapter: a link to a secret.
    (running.path / "adapter").mkdir()
    (running.path / "adapter" / "link").symlink_to(who["ca"] / "ca.key")
    with no_exception_in_a_handler(caplog):
        for name, role in (("op", "operator"), ("aud", "auditor")):
            link = Link(Address(f"127.0.0.1:{running.port}", identities.load(who[name]), name, role), SYSTEM)
            caller = Hostile(name, running.port, who[name], running.path)
            listed = {one["name"] for one in json.loads(link.call("ListFiles", pb.FilesRequest()).json)}
            kept = {f"rounds/0001/updates/{site}.safetensors" for site in deployment.NAMES}
            assert kept & listed == (kept if role == "auditor" else set())
            for one in listed:
                assert caller.call_stream("Fetch", pb.FetchRequest(name=one)) == "OK"
            for one in NAMES_BEYOND + sorted(kept - listed):
                assert caller.call_stream("Fetch", pb.FetchRequest(name=one)).startswith("NOT_FOUND"), one
            for offset in (2**40, 2**63, 2**64 - 1):
                request = pb.FetchRequest(name="config.yaml", offset=offset)
                assert caller.call_stream("Fetch", request).startswith("OUT_OF_RANGE")
            link.close()
            caller.close()
