"""What operators fetch is whole and of one version, whatever is left of an earlier fetch and whatever the run does meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest

from lamina.client.work import Allow, Trained
from lamina.protos import coordinator_pb2 as pb
from lamina.protos.clock import SYSTEM
from lamina.protos.errors import LaminaError
from lamina.protos.files import write_atomic
from lamina.protos.link import Address, Link
from lamina.protos.messages import Instruction
from lamina.server import operate
from lamina.server.export import write_adapter
from lamina.server.port import operations
from tests import deployment
from tests.deployment import Running, Synthetic
from tests.hostile import Hostile, end, eventually

RESULTS = ("adapter", "summary.json", "layers.json", "report.html")


@pytest.fixture
def given(tmp_path: Path) -> list[str]:
    """The words of a run without certificates."""
    (tmp_path / "spec.json").write_text(deployment.spec().to_json())
    return deployment.words(tmp_path / "spec.json", "insecure=true", "rounds=2")


@pytest.fixture
def finished(tmp_path: Path, given: list[str]) -> Iterator[Running]:
    """A coordinator that has finished its run and waits for operators."""
    with deployment.coordinator(tmp_path / "run", [*given, "coordinator.linger_s=60"]) as running:
        for name in deployment.NAMES:
            deployment.in_thread(deployment.agent(name, running.port, tmp_path / name))
        eventually(lambda: any(one["event"] == "finished" for one in running.events))
        yield running


def fetched(running: Running, output: Path) -> Any:
    with operate.dialled(f"127.0.0.1:{running.port}", "", True, "operator") as remote:
        return remote.fetch(output)


def same_files(output: Path, run: Path) -> None:
    """Every file is as the coordinator has it, and nothing is left over."""
    found = {path.relative_to(output): path.read_bytes() for path in output.rglob("*") if path.is_file()}
    assert found
    assert {name: content for name, content in found.items() if (run / name).read_bytes() != content} == {}


@pytest.mark.parametrize("left", [b"of another version", bytes(10**6), None])
def test_what_is_left_of_another_version_is_not_gone_on_with(
    tmp_path: Path, finished: Running, left: bytes | None
) -> None:
    output = tmp_path / "got"
    for name in ("rounds.jsonl", "adapter/adapter_model.safetensors"):
        part = output / f"{name}.part"
        part.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes((finished.path / name).read_bytes()[:100] if left is None else left)
    (output / "config.yaml").write_text("of another run")
    fetched(finished, output)
    same_files(output, finished.path)


def test_a_file_that_changes_after_it_was_listed_is_fetched_as_it_is(
    tmp_path: Path, finished: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One is replaced, one is gone, one has grown."""
    fetch = Link.fetch
    done: list[str] = []

    def late(self: Link, name: str, *rest: Any) -> None:
        if name == "summary.json" and not done:
            done.append(name)
            write_atomic(finished.path / name, "{}\n")
            (finished.path / "layers.json").unlink()
        if name == "events.jsonl":
            with (finished.path / name).open("a") as file:
                file.write("more\n")
        fetch(self, name, *rest)

    monkeypatch.setattr(Link, "fetch", late)
    whole = (finished.path / "events.jsonl").read_bytes()
    fetched(finished, tmp_path / "got")
    assert (tmp_path / "got" / "summary.json").read_text() == "{}\n"
    assert not (tmp_path / "got" / "layers.json").exists()
    assert (tmp_path / "got" / "events.jsonl").read_bytes().removesuffix(b"more\n") == whole
    assert not list((tmp_path / "got").rglob("*.part"))


def test_files_that_always_change_are_given_up(
    tmp_path: Path, finished: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch = Link.fetch

    def late(self: Link, name: str, *rest: Any) -> None:
        if name == "config.yaml":
            (finished.path / name).write_text((finished.path / name).read_text()[1:] + "#")
        fetch(self, name, *rest)

    monkeypatch.setattr(Link, "fetch", late)
    with pytest.raises(LaminaError, match="fetch again"):
        fetched(finished, tmp_path / "got")


@dataclass
class Held(Synthetic):
    """A site that is at the second round until it is let go."""

    go: threading.Event = field(default_factory=threading.Event)

    def train(self, instruction: Instruction, progress: Any, allow: Allow) -> Trained:
        assert instruction.round < 2 or self.go.wait(60)
        return super().train(instruction, progress, allow)


def test_a_run_that_goes_on_after_its_end_has_no_results_until_the_next(tmp_path: Path, given: list[str]) -> None:
    with deployment.coordinator(tmp_path / "run", given) as running:
        end(running, None)
    assert all((tmp_path / "run" / name).exists() for name in RESULTS)
    held = Held("north")
    with deployment.coordinator(tmp_path / "run", given) as running:
        try:
            workers = {name: Synthetic(name) for name in deployment.NAMES} | {"north": held}
            for name, worker in workers.items():
                deployment.in_thread(deployment.agent(name, running.port, tmp_path / name, worker=worker))
            eventually(lambda: any(one["event"] == "round" for one in running.events))
            fetched(running, tmp_path / "got")
            names = {path.name for path in (tmp_path / "got").iterdir()}
            assert not names & {*RESULTS}
            assert (tmp_path / "got" / "latest" / "round.txt").read_text() == "1\n"
        finally:
            held.go.set()
        assert running.join() == 0
    assert all((tmp_path / "run" / name).exists() for name in RESULTS)
    assert not (tmp_path / "run" / "latest").exists()


def test_the_last_adapter_is_written_by_one_at_a_time(
    tmp_path: Path, given: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    inside, most = [0], [0]

    def slow(*arguments: Any) -> None:
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        threading.Event().wait(0.2)
        write_adapter(*arguments)
        inside[0] -= 1

    monkeypatch.setattr(operations, "write_adapter", slow)
    held = Held("north")
    with deployment.coordinator(tmp_path / "run", given) as running:
        try:
            workers = {name: Synthetic(name) for name in deployment.NAMES} | {"north": held}
            for name, worker in workers.items():
                deployment.in_thread(deployment.agent(name, running.port, tmp_path / name, worker=worker))
            eventually(lambda: any(one["event"] == "round" for one in running.events))
            with ThreadPoolExecutor(4) as pool:
                list(pool.map(lambda number: fetched(running, tmp_path / f"got-{number}"), range(4)))
        finally:
            held.go.set()
            end(running, None)
        assert most == [1]
        assert not [one for one in running.events if one["event"] == "fault"]
    for number in range(4):
        assert (tmp_path / f"got-{number}" / "latest" / "round.txt").read_text() == "1\n"


@pytest.mark.parametrize(("method", "request_"), [("Status", pb.StatusRequest()), ("Watch", pb.WatchRequest())])
def test_a_fault_in_a_handler_is_told_to_the_log_and_not_to_the_caller(
    tmp_path: Path, given: list[str], monkeypatch: pytest.MonkeyPatch, method: str, request_: Any
) -> None:
    def broken(run: Any) -> Any:
        raise FileNotFoundError(2, "No such file", "/srv/secret")

    with deployment.coordinator(tmp_path / "run", given) as running:
        caller = Hostile("op", running.port, None, tmp_path)
        caller.metadata = (("lamina-name", "op"), ("lamina-role", "operator"))
        with monkeypatch.context() as patch:
            patch.setattr(operations, "status", broken)
            call = caller.call if method == "Status" else caller.call_stream
            said = call(method, request_)
        caller.close()
        end(running, None)
    assert said == "INTERNAL: the coordinator failed in this call. Its operator is told; try again later."
    (fault,) = (one for one in running.events if one["event"] == "fault")
    assert (fault["method"], fault["kind"]) == (method, "FileNotFoundError")
    assert "operations.py:" in fault["place"]
    assert "secret" not in str(fault)


def test_a_refusal_is_no_fault(tmp_path: Path, finished: Running) -> None:
    link = Link(Address(f"127.0.0.1:{finished.port}", None, "op", "operator"), SYSTEM)
    with pytest.raises(LaminaError, match="no such file") as caught:
        list(link.stream("Fetch", pb.FetchRequest(name="absent")))
    assert getattr(caught.value, "code", None) == grpc.StatusCode.NOT_FOUND
    link.close()
    assert not [one for one in finished.events if one["event"] == "fault"]
