"""What operators see and do while a coordinator runs: watching, looking, and not starting it twice."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import NoReturn

import pytest

from lamina.protos.errors import ConfigError, DataError, TrainingError
from lamina.server import operate
from lamina.server.store import run_directory
from tests import deployment
from tests.e2e.commands import failed, here, lamina

ROUNDS = 2


@pytest.fixture
def given(tmp_path: Path) -> list[str]:
    """The words of a short run without certificates."""
    file = tmp_path / "spec.json"
    file.write_text(deployment.spec().to_json())
    return deployment.words(file, "insecure=true", f"rounds={ROUNDS}", "coordinator.linger_s=60")


def test_watching_gives_lines_for_people(tmp_path: Path, given: list[str]) -> None:
    with deployment.coordinator(tmp_path / "run", given) as running:
        for name in deployment.NAMES:
            deployment.in_thread(deployment.agent(name, running.port, tmp_path / name))
        with operate.dialled(f"127.0.0.1:{running.port}", "", True, "operator") as coordinator:
            lines = [operate.watched(document) for document in coordinator.watch()]
            now = coordinator.status()
    assert [line.split(":")[0] for line in lines if line.startswith("round")] == ["round 1", "round 2"]
    assert "finished, 2 of 2 rounds done" in lines[-1]
    assert "s ago" in lines[-1]
    # There is no round after the last, and nobody is at anything.
    assert now["round"] == now["rounds"] == ROUNDS
    assert [(one["asked"], one["training_round"], one["step"]) for one in now["clients"]] == [(None, 0, 0)] * 3


def test_a_run_that_is_over_takes_no_orders(
    tmp_path: Path, given: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with deployment.coordinator(tmp_path / "run", given) as running:
        for name in deployment.NAMES:
            deployment.in_thread(deployment.agent(name, running.port, tmp_path / name))
        where = f"127.0.0.1:{running.port}"
        assert here(capsys, "watch", where, "insecure=true").code == 0
        before = (running.path / "events.jsonl").read_bytes()
        for words in (["pause"], ["pause", "resume=true"], ["stop"], ["stop", "now=true"]):
            assert "the run is over" in failed(here(capsys, words[0], where, "insecure=true", *words[1:]))
        assert (running.path / "events.jsonl").read_bytes() == before


class Failing(deployment.Synthetic):
    """A site whose training fails."""

    def train(self, *given: object) -> NoReturn:
        raise TrainingError("the loss is not finite.")


def test_the_coordinators_own_log_says_who_came_and_who_ordered_what(
    tmp_path: Path, given: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with deployment.coordinator(tmp_path / "run", given) as running:
        where = f"127.0.0.1:{running.port}"
        assert here(capsys, "pause", where, "insecure=true").out.startswith("paused; no further round is opened\n")
        assert "no site has registered yet; waiting for 3" in here(capsys, "status", where, "insecure=true").out
        for name, kind in zip(deployment.NAMES, (deployment.Synthetic, deployment.Synthetic, Failing), strict=True):
            deployment.in_thread(deployment.agent(name, running.port, tmp_path / name, worker=kind(name)))
        assert here(capsys, "pause", where, "insecure=true", "resume=true").out.startswith("resumed; ")
        assert here(capsys, "watch", where, "insecure=true").code == 0
    said = [one for one in running.events if one["event"] not in ("listening", "round", "finished")]
    assert said[0] == {"event": "paused", "by": "operator"}
    assert {"event": "resumed", "by": "operator"} in said
    assert {"event": "registered", "client": "west", "rank": 2} in said
    rejected = [one for one in said if one["event"] == "rejected"]
    failed = {"client": "west", "reason": "failed", "code": "training"}
    assert rejected == [{"event": "rejected", "round": n, **failed} for n in (1, 2)]
    opened = [one for one in said if one["event"] == "opened"]
    assert opened == [{"event": "opened", "round": n, "asked": sorted(deployment.NAMES)} for n in (1, 2)]


def test_a_coordinator_that_is_started_again_says_where_it_goes_on(tmp_path: Path, given: list[str]) -> None:
    words = [one for one in given if not one.startswith("coordinator.linger_s")]
    with deployment.coordinator(tmp_path / "run", words) as running:
        for name in deployment.NAMES:
            worker = deployment.Synthetic(name, step_s=0.05, steps=2 if name != "west" else 10_000)
            deployment.in_thread(deployment.agent(name, running.port, tmp_path / name, worker=worker))
        with operate.dialled(f"127.0.0.1:{running.port}", "", True, "operator") as coordinator:
            for document in coordinator.watch():
                if "status" in document and document["status"]["round_open"]:
                    break
            coordinator.stop(now=True)
        assert running.join() == 0
    with deployment.coordinator(tmp_path / "run", words) as running:
        assert [one for one in running.events if one["event"] == "continues"] == [{"event": "continues", "round": 1}]
        with operate.dialled(f"127.0.0.1:{running.port}", "", True, "operator") as coordinator:
            coordinator.stop(now=True)


def test_a_second_coordinator_is_kept_out(tmp_path: Path, given: list[str]) -> None:
    with deployment.coordinator(tmp_path / "run", given):
        before = (tmp_path / "run" / "events.jsonl").read_bytes()
        with deployment.coordinator(tmp_path / "run", given) as second, pytest.raises(ConfigError, match="another"):
            second.join()
        assert (tmp_path / "run" / "events.jsonl").read_bytes() == before


class Unfit(deployment.Synthetic):
    """A site whose data cannot be read."""

    def begin(self, *given: object) -> None:
        raise DataError("data.source=notes.jsonl: expected a file, found none.")


def test_a_site_that_cannot_take_part_is_not_waited_for(tmp_path: Path, given: list[str]) -> None:
    words = [*given, "clients.start=3", "clients.quorum=2"]
    with deployment.coordinator(tmp_path / "run", words) as running:
        thread, outcome = deployment.in_thread(
            deployment.agent("west", running.port, tmp_path / "west", worker=Unfit("west"))
        )
        thread.join(30)
        assert isinstance(outcome[0], DataError)
        with operate.dialled(f"127.0.0.1:{running.port}", "", True, "operator") as coordinator:
            assert [one["registered"] for one in coordinator.status()["clients"]] == [False]
            assert "has left" in operate.shown(coordinator.status())
            assert {"event": "left", "client": "west"} in running.events
            # The first round waits for three that are there, and not for an answer of one that has left.
            for name in ("north", "south"):
                deployment.in_thread(deployment.agent(name, running.port, tmp_path / name))
            deployment.in_thread(deployment.agent("west", running.port, tmp_path / "west"))
            for _ in coordinator.watch():
                pass
        records = run_directory.read_records(running.path)
    assert [record["clients"] for record in records] == [list(deployment.NAMES)] * ROUNDS


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_a_signal_ends_the_wait_for_operators(tmp_path: Path, given: list[str]) -> None:
    port, log = deployment.free_port(), tmp_path / "log"
    process = deployment.start_coordinator(tmp_path / "run", port, given, log)
    try:
        deployment.wait_for(log, "listening")
        sites = [deployment.agent(name, port, tmp_path / name) for name in deployment.NAMES]
        threads = [deployment.in_thread(one)[0] for one in sites]
        for thread in threads:
            thread.join(60)
        deployment.wait_for(log, "finished")
        assert lamina("fetch", f"127.0.0.1:{port}", "insecure=true", f"output={tmp_path / 'got'}").code == 0
        os.kill(process.pid, signal.SIGTERM)
        # Well below linger_s, and a bound only so that a failure ends.
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
    assert (tmp_path / "got" / "adapter" / "adapter_model.safetensors").exists()
