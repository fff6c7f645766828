"""What the tests of disks share: sites that outlive the coordinator, disks that fill up, and what a whole directory is."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lamina.protos.errors import LaminaError
from lamina.server import coordinator as coordinators
from lamina.server.store import run_directory
from tests import deployment
from tests.deployment import NAMES, in_thread
from tests.runs import same_bits


def words_in(folder: Path, *more: str) -> list[str]:
    spec_file = folder / "spec.json"
    spec_file.write_text(deployment.spec().to_json())
    return deployment.words(spec_file, "insecure=true", "wire.heartbeat_s=0.2", *more)


@contextlib.contextmanager
def sites(folder: Path, port: int, names: tuple[str, ...] = NAMES, **more: Any) -> Iterator[list[Any]]:
    """Agents that stay through whatever the coordinator does."""
    found = [deployment.agent(name, port, folder / name, **more) for name in names]
    started = [in_thread(one) for one in found]
    try:
        yield started
    finally:
        for one in found:
            one.stop()
        for thread, _ in started:
            thread.join(20)


def served(path: Path, words: list[str]) -> int | BaseException:
    """A coordinator from start to end in this thread."""
    try:
        return coordinators.serve(deployment.config_of(words), path, lambda *_, **__: None)
    except LaminaError as error:
        return error


def full_at(monkeypatch: pytest.MonkeyPatch, pattern: str, time: int) -> list[str]:
    """The disk is full from the n-th flush of a file of this name on: what was written of it is half there, and says so."""
    real, hits, once = os.fsync, list[str](), threading.Lock()

    def fsync(descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if not re.search(pattern, path):
            return real(descriptor)
        with once:
            hits.append(path)
            late = len(hits) >= time
        if not late:
            return real(descriptor)
        if os.path.isfile(path):
            os.truncate(path, os.path.getsize(path) // 2)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)

    monkeypatch.setattr(os, "fsync", fsync)
    return hits


def whole(path: Path, words: list[str], without: tuple[tuple[str, int], ...] = ()) -> None:
    """The bits of a run without faults, one record a round, and nothing half-written."""
    assert same_bits(deployment.final(path), deployment.fault_free(words, without=without))
    assert [record["round"] for record in run_directory.read_records(path)] == [1, 2, 3]
    for line in (path / "events.jsonl").read_text().splitlines():
        json.loads(line)
    assert json.loads((path / "summary.json").read_text())["rounds"] == 3
    assert not [one for one in path.rglob("*.partial") if one.is_file()]
