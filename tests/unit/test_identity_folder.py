"""An identity's folder while it is renewed: the old set or the new, at every step and for every reader."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509

from lamina.protos import identity
from lamina.protos.identity import authority as pki
from lamina.protos.identity import folder, site
from lamina.protos.identity.authority import Authority
from tests.consortium import NOW, enrolled, new_ca


@pytest.fixture
def ca(tmp_path: Path) -> Authority:
    return new_ca(tmp_path / "ca")


@pytest.fixture
def north(ca: Authority, tmp_path: Path) -> Path:
    return enrolled(ca, tmp_path / "north", "north")


def parsed(place: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate((place / "certificate.pem").read_bytes())


def renewed(ca: Authority, place: Path, rotate: bool = False, now: datetime = NOW) -> None:
    site.accept_renewal(place, pki.fulfil(ca, site.prepare_renewal(place, rotate), now), now)


def test_renewing_changes_the_tls_key_and_keeps_the_signing_key(ca: Authority, north: Path) -> None:
    before = identity.load(north)
    renewed(ca, north)
    kept = identity.load(north)
    renewed(ca, north, rotate=True)
    rotated = identity.load(north)
    assert len({one.tls_key_pem for one in (before, kept, rotated)}) == 3
    assert before.peer.signing_key == kept.peer.signing_key != rotated.peer.signing_key
    assert {one.peer.name for one in (before, kept, rotated)} == {"north"}
    assert sorted(path.name for path in (north / "sets").iterdir()) == [f"{rotated.peer.serial:x}"]
    assert not (north / "pending").exists()


def test_a_renewed_coordinator_keeps_its_hosts(ca: Authority, tmp_path: Path) -> None:
    hub = enrolled(ca, tmp_path / "hub", "hub", "coordinator")
    before = parsed(hub).extensions.get_extension_for_class(x509.SubjectAlternativeName)
    renewed(ca, hub)
    assert parsed(hub).extensions.get_extension_for_class(x509.SubjectAlternativeName) == before


class Crash(BaseException):
    """As kill -9: nothing catches it."""


def accept_until(step: int, place: Path, pem: bytes, patch: pytest.MonkeyPatch) -> bool:
    """Install the renewal, but die before the given change to the disk. Whether it got through."""
    steps = iter(range(1000))

    def crashing(real: Callable[..., Any]) -> Callable[..., Any]:
        def change(*args: Any, **kwargs: Any) -> Any:
            if next(steps) == step:
                raise Crash
            return real(*args, **kwargs)

        return change

    with patch.context() as inner:
        for name in ("replace", "open", "fsync", "unlink", "rmdir", "symlink", "mkdir"):
            inner.setattr(os, name, crashing(getattr(os, name)))
        try:
            site.accept_renewal(place, pem, NOW)
        except Crash:
            return False
    return True


def test_a_crash_at_any_step_of_renewing_leaves_the_old_set_or_the_new(
    ca: Authority, north: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = identity.load(north).peer
    pem = pki.fulfil(ca, site.prepare_renewal(north, True), NOW)
    new = identity.peer_of(pem)
    seen = []
    for step in range(200):
        place = shutil.copytree(north, tmp_path / f"copy{step}", symlinks=True)
        through = accept_until(step, place, pem, monkeypatch)
        seen.append(identity.load(place).peer)
        site.accept_renewal(place, pem, NOW)  # given again, it finishes
        assert identity.load(place).peer == new
        assert len(list((place / "sets").iterdir())) == 1
        assert not (place / "pending").exists()
        if through:
            break
    # First the old one, from one step on the new one, never anything else.
    assert through
    assert seen == [old] * seen.count(old) + [new] * seen.count(new)
    assert seen.count(old) > 5 < seen.count(new)


def test_a_set_that_is_replaced_while_it_is_read_is_read_again(
    ca: Authority, north: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = folder.require_private, iter(range(100))

    def replaced_meanwhile(path: Path) -> None:
        if next(calls) == 1:
            monkeypatch.setattr(folder, "require_private", real)
            renewed(ca, north)
        real(path)

    monkeypatch.setattr(folder, "require_private", replaced_meanwhile)
    serial = identity.load(north).peer.serial
    assert serial == parsed(north).serial_number
