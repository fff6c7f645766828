"""A hostile site against a real coordinator over mutual TLS: each of its messages is refused with a reason that is counted, no
handler fails, and the adapter is that of a run without the site, bit for bit.
"""

from __future__ import annotations

import contextlib
import json
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as hst

from lamina.client.listening import signer
from lamina.client.work import Allow, Trained
from lamina.protos import coordinator_pb2 as pb
from lamina.protos import identity as identities
from lamina.protos import statements as st
from lamina.protos.adapter import Adapter, LoraFactors
from lamina.protos.clock import Clock
from lamina.protos.codec import encode_update
from lamina.protos.messages import Instruction, Update
from lamina.server.store import run_directory
from tests import deployment
from tests.deployment import Synthetic, in_thread
from tests.federation import with_dense, with_factors
from tests.hostile import Hostile, encoded, end, eventually, no_exception_in_a_handler
from tests.runs import same_bits

Q = "block.q_proj"
HONEST = ("north", "south")
WEST = "west"


@pytest.fixture(scope="module")
def who(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return deployment.certificates(tmp_path_factory.mktemp("pki"))


@pytest.fixture
def words(tmp_path: Path, who: dict[str, Path]) -> list[str]:
    spec_file = tmp_path / "spec.json"
    spec_file.write_text(deployment.spec().to_json())
    return deployment.words(spec_file, f"coordinator.identity={who['coordinator']}", "evaluate.every=1000")


@pytest.fixture(autouse=True)
def quiet_handlers(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    with no_exception_in_a_handler(caplog):
        yield


# --- what an update holds: one attack a round, each judged by the round loop --------------------------------------------------


def factors_with(change: Callable[[LoraFactors], LoraFactors]) -> Callable[[Update], Update]:
    return lambda update: with_factors(update, Q, change(update.adapter.lora[Q]))


def filled(value: float) -> Callable[[Update], Update]:
    def change(one: LoraFactors) -> LoraFactors:
        return LoraFactors(np.full_like(one.A, value), np.full_like(one.B, value), one.scale)

    return factors_with(change)


def spot(value: float) -> Callable[[Update], Update]:
    def change(one: LoraFactors) -> LoraFactors:
        rows = one.A.copy()
        rows[0, 3] = value
        return LoraFactors(rows, one.B, one.scale)

    return factors_with(change)


def ranked(rank: int) -> Callable[[Update], Update]:
    return factors_with(lambda f: LoraFactors(np.ones((rank, 16), np.float32), np.ones((24, rank), np.float32), 2.0))


def dropped(update: Update) -> Update:
    lora = {module: one for module, one in update.adapter.lora.items() if module != Q}
    return replace(update, adapter=Adapter(lora, update.adapter.dense))


def header_of(content: bytes) -> tuple[dict[str, Any], bytes]:
    size = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def container(header: dict[str, Any] | bytes, body: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def headed(change: Callable[[dict[str, Any]], None]) -> Callable[[Update], bytes]:
    """An honest update whose header is changed."""

    def made(update: Update) -> bytes:
        header, body = header_of(encoded(update))
        change(header)
        return container(header, body)

    return made


def shape(name: str, dims: list[int]) -> Callable[[Update], bytes]:
    return headed(lambda header: header[name].update(shape=dims))


def overlapping(header: dict[str, Any]) -> None:
    names = [name for name in header if name != "__metadata__"]
    same = [name for name in names if header[name]["shape"] == header[names[0]]["shape"]]
    header[names[-1]]["data_offsets"] = header[names[0]]["data_offsets"] if same else [0, 4]


def doubled(update: Update) -> bytes:
    """One name for two places."""
    header, body = header_of(encoded(update))
    text = json.dumps(header)
    entry = json.dumps({f"{Q}.lora_A.weight": header["block.up_proj.lora_A.weight"]})[1:-1]
    return container((text[:-1] + ", " + entry + "}").encode(), body)


def empty_giant(dims: list[int]) -> Callable[[Update], bytes]:
    """An array without numbers whose shape numpy cannot hold: it is read from its file only after the header was accepted."""

    def made(update: Update) -> bytes:
        header, body = header_of(encoded(update))
        header["head.bias"] = {"dtype": "F32", "shape": dims, "data_offsets": [len(body), len(body)]}
        return container(header, body)

    return made


def many_tensors(update: Update) -> bytes:
    tiny = {f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(15_000)}
    header, body = header_of(encoded(update))
    return container({"__metadata__": header["__metadata__"]} | tiny | header, body)


def fields(**changes: Any) -> Callable[[Update], bytes]:
    def made(update: Update) -> bytes:
        header, body = header_of(encoded(update))
        said = json.loads(header["__metadata__"]["update"]) | changes
        header["__metadata__"]["update"] = json.dumps(said)
        return container(header, body)

    return made


ATTACKS: dict[str, tuple[str, Callable[[Update], Update | bytes]]] = {
    "not a number": ("non-finite", spot(float("nan"))),
    "infinity": ("non-finite", spot(float("inf"))),
    "infinity in the head": ("non-finite", lambda u: with_dense(u, "head.weight", np.full((2, 3), -np.inf, "f4"))),
    "numbers that overflow in a sum": ("norm", filled(3e38)),
    "numbers that overflow in a square": ("norm", filled(1e20)),
    "numbers of no training": ("norm", filled(1e5)),
    "a head of no training": ("norm", lambda u: with_dense(u, "head.weight", np.full((2, 3), 3e38, "f4"))),
    "a larger rank": ("rank", ranked(3)),
    "rank zero": ("rank", ranked(0)),
    "another scale": ("rank", factors_with(lambda f: LoraFactors(f.A, f.B, f.scale * 1000))),
    "swapped factors": ("schema", factors_with(lambda f: LoraFactors(f.B.T.copy(), f.A.T.copy(), f.scale))),
    "an unknown module": ("schema", lambda u: with_factors(u, "block.k_proj", u.adapter.lora[Q])),
    "a path as module": ("schema", lambda u: with_factors(u, "../../../etc/passwd", u.adapter.lora[Q])),
    "a missing module": ("schema", dropped),
    "no head": ("schema", lambda u: replace(u, adapter=Adapter(u.adapter.lora, {}))),
    "a path as head": ("schema", lambda u: with_dense(u, "/tmp/head", np.zeros(2, np.float32))),
    "a head of another shape": ("schema", lambda u: with_dense(u, "head.weight", np.zeros((3, 2), np.float32))),
    "another number format": ("rank", lambda u: encode_update(ranked(3)(u), "bf16")),
    "tensors by the thousand": ("schema", many_tensors),
    "examples beyond any site": ("weight", lambda u: replace(u, num_examples=10**12)),
    "no examples": ("weight", lambda u: replace(u, num_examples=0)),
    "another run inside": ("wrong-run", lambda u: replace(u, run_id="other")),
    "another round inside": ("wrong-round", lambda u: replace(u, round=u.round + 1)),
    "another client inside": ("wrong-client", lambda u: replace(u, client_id="north")),
    "another release inside": ("wrong-parent", lambda u: replace(u, parent_release_hash="0" * 64)),
    "a round that is text": ("malformed", fields(round="1")),
    "examples without end": ("malformed", fields(num_examples=float("inf"))),
    "a lone surrogate": ("wrong-run", fields(run_id="\ud800" * 900)),
    "a shape that lies": ("malformed", shape(f"{Q}.lora_A.weight", [2, 15])),
    "offsets that overlap": ("malformed", headed(overlapping)),
    "one name twice": ("malformed", doubled),
    "a shape beyond an address": ("malformed", empty_giant([2**62, 0])),
    "a shape beyond an integer": ("malformed", empty_giant([2**64 - 1, 0])),
    "a hundred dimensions": ("malformed", empty_giant([0] * 100)),
    "cut": ("malformed", lambda u: encoded(u)[:-1]),
    "longer": ("malformed", lambda u: encoded(u) + b"\0"),
    "nothing of an update": ("malformed", lambda u: b"Dear coordinator"),
    "a deep header": ("malformed", lambda u: container(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", b"")),
}


@dataclass
class Attacker(Synthetic):
    """A site whose agent is the usual one and whose updates are not."""

    attacks: list[Callable[[Update], Update | bytes]] = field(default_factory=list)

    def train(self, instruction: Instruction, progress: Callable[[int], None], allow: Allow) -> Trained:
        update = deployment.trained(self.name, self.seed, self.budget, self.spec, instruction)
        made = self.attacks[instruction.round - 1](update)
        return Trained(made if isinstance(made, bytes) else encoded(made), {})


def test_each_bad_update_is_one_counted_rejection(tmp_path: Path, who: dict[str, Path], words: list[str]) -> None:
    given_words = deployment.words(
        tmp_path / "spec.json", *words, f"rounds={len(ATTACKS)}", "train.schedule=constant", "checkpoints=1"
    )
    attacker = Attacker(WEST, attacks=[attack for _, attack in ATTACKS.values()])
    with deployment.coordinator(tmp_path / "run", given_words) as running:
        sites = [in_thread(deployment.agent(n, running.port, tmp_path / n, who[n])) for n in HONEST]
        sites.append(in_thread(deployment.agent(WEST, running.port, tmp_path / WEST, who[WEST], worker=attacker)))
        assert running.join(100) == 0
        for thread, outcome in sites:
            thread.join(20)
            assert outcome == [0]
    records = run_directory.read_records(running.path)
    found = {name: record["rejections"] for name, record in zip(ATTACKS, records, strict=True)}
    assert found == {name: [{"client_id": WEST, "reason": reason}] for name, (reason, _) in ATTACKS.items()}
    without = [(WEST, number) for number in range(1, len(ATTACKS) + 1)]
    assert same_bits(deployment.final(running.path), deployment.fault_free(given_words, without=without))


def test_a_configured_bound_on_the_norm(tmp_path: Path, who: dict[str, Path], words: list[str]) -> None:
    given_words = deployment.words(tmp_path / "spec.json", *words, "rounds=1", "aggregation.max_norm=60")
    attacker = Attacker(WEST, attacks=[filled(4.0)])
    with deployment.coordinator(tmp_path / "run", given_words) as running:
        for name in HONEST:
            in_thread(deployment.agent(name, running.port, tmp_path / name, who[name]))
        in_thread(deployment.agent(WEST, running.port, tmp_path / WEST, who[WEST], worker=attacker))
        assert running.join() == 0
    (record,) = run_directory.read_records(running.path)
    assert record["rejections"] == [{"client_id": WEST, "reason": "norm"}]
    assert same_bits(deployment.final(running.path), deployment.fault_free(given_words, without=[(WEST, 1)]))


# --- what a client says: a raw client against an open round -------------------------------------------------------------------


@dataclass
class Scene:
    """A run of one round in which two sites are honest, and perhaps held until `finish`, and the third is hostile."""

    running: deployment.Running
    west: Hostile
    words: list[str]
    honest: list[tuple[threading.Thread, list[Any]]]
    gate: threading.Event

    def finish(self, *reasons: str, perhaps: str = "") -> None:
        """End the round; the rejections of the hostile site, one perhaps among them, and the bits of a run without it."""
        self.gate.set()
        assert self.running.join() == 0
        for thread, outcome in self.honest:
            thread.join(20)
            assert outcome == [0]
        records = run_directory.read_records(self.running.path)
        for record in records:
            found = {(one["client_id"], one["reason"]) for one in record["rejections"]}
            assert found - {(WEST, perhaps)} == {(WEST, reason) for reason in reasons}
        expected = deployment.fault_free(self.words, without=[(WEST, record["round"]) for record in records])
        assert same_bits(deployment.final(self.running.path), expected)


@dataclass
class Held(Synthetic):
    """A site that trains once the gate is open."""

    gate: threading.Event = field(default_factory=threading.Event)

    def train(self, instruction: Instruction, progress: Callable[[int], None], allow: Allow) -> Trained:
        assert self.gate.wait(60)
        return super().train(instruction, progress, allow)


@pytest.fixture
def scene(tmp_path: Path, who: dict[str, Path], words: list[str]) -> Iterator[Scene]:
    with scene_with(tmp_path, who, words, Clock()) as made:
        yield made


@contextlib.contextmanager
def scene_with(
    tmp_path: Path, who: dict[str, Path], words: list[str], clock: Clock, *more: str, held: bool = False
) -> Iterator[Scene]:
    gate = threading.Event()
    if not held:
        gate.set()
    given_words = deployment.words(tmp_path / "spec.json", *words, "rounds=1", "wire.heartbeat_s=0.3", *more)
    with deployment.coordinator(tmp_path / "run", given_words, clock) as running:
        honest = [
            in_thread(deployment.agent(n, running.port, tmp_path / n, who[n], worker=Held(n, gate=gate)))
            for n in HONEST
        ]
        west = Hostile(WEST, running.port, who[WEST], tmp_path / "west")
        west.register()
        try:
            yield Scene(running, west, given_words, honest, gate)
        finally:
            gate.set()
            west.close()
            end(running, who["op"])


def test_claims_that_lie(scene: Scene, who: dict[str, Path]) -> None:
    west = scene.west
    asked = west.instruction()
    content = encoded(west.honest(asked))
    good = west.claim(asked, content)
    south = signer(identities.load(who["south"]))

    def tried(sent: bytes = content, sign: st.Sign | None = None, domain: str = st.CLAIM, **changes: Any) -> str:
        return west.upload(west.statement(domain, good | changes, sign), sent)

    lies: dict[str, tuple[str, str]] = {
        "more than claimed": ("INVALID_ARGUMENT: malformed", tried(num_bytes=len(content) - 1)),
        "less than claimed": ("ended", tried(num_bytes=len(content) + 1, sha256="1" * 64)),
        "nothing": ("INVALID_ARGUMENT: too-large", tried(num_bytes=0)),
        "more than a rank can take": ("INVALID_ARGUMENT: too-large", tried(num_bytes=10**9)),
        "a length that no disk has": ("INVALID_ARGUMENT: malformed", tried(num_bytes=2**70)),
        "less than nothing": ("INVALID_ARGUMENT: malformed", tried(num_bytes=-1)),
        "another content": ("DATA_LOSS: malformed", tried(content[:-1] + b"\x55")),
        "a path as hash": ("INVALID_ARGUMENT: malformed", tried(sha256="../" * 21 + "x")),
        "capitals": ("INVALID_ARGUMENT: malformed", tried(sha256="A" * 64)),
        "the round before": ("FAILED_PRECONDITION: wrong-round", tried(round=0)),
        "the round after": ("FAILED_PRECONDITION: wrong-round", tried(round=2)),
        "a round that no database holds": ("INVALID_ARGUMENT: malformed", tried(round=2**63)),
        "another run": ("INVALID_ARGUMENT: wrong-run", tried(run_id="000000000000")),
        "another client": ("INVALID_ARGUMENT: wrong-client", tried(client_id="south")),
        "another release": ("INVALID_ARGUMENT: wrong-parent", tried(parent="0" * 64)),
        "another's signature": ("INVALID_ARGUMENT: signature", tried(sign=south)),
        "another's claim, as it was": ("INVALID_ARGUMENT: signature", tried(sign=south, client_id="south")),
        "a signature for another purpose": ("INVALID_ARGUMENT: signature", tried(domain=st.REPORT)),
        "no signature": ("INVALID_ARGUMENT: signature", tried(sign=lambda domain, statement: b"")),
        "an edited signature": ("INVALID_ARGUMENT: signature", tried(sign=lambda d, s: south(d, s)[:-1] + b"\0")),
        "no claim": ("INVALID_ARGUMENT: signature", west.send([pb.UploadPart(data=content)])),
        "an empty part": ("INVALID_ARGUMENT: signature", west.send([pb.UploadPart()])),
        "no part": ("ended", west.send([])),
    }
    wrong = {name: got for name, (wanted, got) in lies.items() if not got.startswith(wanted)}
    assert wrong == {}
    assert west.poison(asked) == "stored"
    counted = ("malformed", "too-large", "wrong-round", "wrong-run", "wrong-client", "wrong-parent", "signature")
    scene.finish(*counted)


WITNESSES: list[object] = [
    "yes",
    {"n": 1},
    [1e400, "ab", "00"],
    [2**80, "ab", "00" * 64],
    [-1, "ab", "00" * 64],
    [True, "ab", "00"],
    [0, "\ud800", "00" * 64],
    [0, "ab" * 32, "zz"],
    [0, "ab" * 32, "00" * 64],
    [0, None, None],
]


def test_a_countersignature_that_is_none_is_left_out(tmp_path: Path, who: dict[str, Path], words: list[str]) -> None:
    """It is no reason to refuse the update, which counts."""
    with scene_with(tmp_path, who, words, Clock(), f"rounds={len(WITNESSES)}") as scene:
        west = scene.west
        for number, witness in enumerate(WITNESSES, 1):
            asked = west.instruction(round_number=number)
            content = encoded(west.honest(asked))
            text = json.dumps(west.claim(asked, content, witness=witness)).encode()
            assert west.upload(west.raw(st.CLAIM, text), content) == "stored"
        assert scene.running.join() == 0
        assert same_bits(deployment.final(scene.running.path), deployment.fault_free(scene.words))
        log = (scene.running.path / "events.jsonl").read_text().splitlines()
        assert [line for line in log if '"countersign"' in line and '"north"' in line]
        assert not [line for line in log if '"countersign"' in line and '"west"' in line]


def test_what_a_site_begins_and_what_is_refused_of_it_does_not_pile_up(
    tmp_path: Path, who: dict[str, Path], words: list[str]
) -> None:
    """Of its uploads one is on the disk, whole or not, however many it begins and however many are refused."""
    with scene_with(tmp_path, who, words, Clock(), held=True) as scene:
        west, folder = scene.west, scene.running.path / "blobs"
        asked = west.instruction()
        for number in range(12):
            lie = west.claim(asked, b"half" * 500, sha256=f"{number:064x}", num_bytes=5000)
            assert west.upload(west.statement(st.CLAIM, lie), b"half" * 500) == "ended"
        assert len(list(folder.glob("partial/1-west-*"))) == 1
        for number in range(12):
            content = f"no update {number}".encode() * 50

            def taken(sent: bytes = content) -> bool:  # while the one before is judged, another is a duplicate
                return west.upload(west.statement(st.CLAIM, west.claim(asked, sent)), sent) == "stored"

            eventually(taken)
        refused = [path for path in folder.glob("??/*") if path.read_bytes().startswith(b"no update")]
        assert len(refused) == 1
        assert not [path for path in folder.glob("partial/1-west-*") if path.stat().st_size]
        scene.finish("malformed", perhaps="duplicate")


def test_the_same_update_twice_is_one_and_another_is_a_duplicate(scene: Scene) -> None:
    west = scene.west
    asked = west.instruction()
    update = west.honest(asked)
    content, other = encoded(update), encoded(replace(update, metrics={}))
    signed = west.statement(st.CLAIM, west.claim(asked, content))
    assert west.upload(signed, content) == "stored"
    again = west.upload(signed)  # not a byte of it is sent again
    another = west.upload(west.statement(st.CLAIM, west.claim(asked, other)), other)
    # Whichever the round loop had got to by then: both refuse the second update.
    assert again == "stored"
    assert another.partition(": ")[2].partition(":")[0] in ("duplicate", "wrong-round", "late"), another
    assert scene.running.join() == 0
    assert same_bits(deployment.final(scene.running.path), deployment.fault_free(scene.words))


def test_uploads_that_never_come_take_nobody_elses_place(
    tmp_path: Path, who: dict[str, Path], words: list[str]
) -> None:
    """A hundred at once from one client, all of which stand still, with one place to write: the honest are not kept waiting."""
    with scene_with(tmp_path, who, words, Clock(), "coordinator.uploads=1") as scene:
        west = scene.west
        asked = west.instruction()
        content = encoded(west.honest(asked))
        over = threading.Event()
        ends: list[str] = []

        def stuck(number: int) -> None:
            claim = west.statement(st.CLAIM, west.claim(asked, content, sha256=f"{number:064x}"))

            def parts() -> Iterator[pb.UploadPart]:
                yield pb.UploadPart(claim=claim)
                yield pb.UploadPart(data=content[:10])
                over.wait(60)

            ends.append(west.send(parts(), 60.0))

        threads = [threading.Thread(target=stuck, args=(number,), daemon=True) for number in range(100)]
        for thread in threads:
            thread.start()
        eventually(lambda: len(ends) >= 99)
        assert {end.partition(":")[0] for end in ends} <= {"CANCELLED", "RESOURCE_EXHAUSTED", "ended"}
        assert west.poison(asked) == "stored"
        over.set()
        for thread in threads:
            thread.join(20)
        scene.finish("malformed")


def test_an_upload_that_stands_still_is_ended(tmp_path: Path, who: dict[str, Path], words: list[str]) -> None:
    """The place that it takes is given back although its sender lives and says nothing more."""
    with scene_with(
        tmp_path,
        who,
        words,
        Clock(rate=120.0),
        "coordinator.uploads=1",
        "clients.deadline_s=100000",
        "wire.heartbeat_s=60",
    ) as scene:
        west = scene.west
        asked = west.instruction()
        content = encoded(west.honest(asked))
        over = threading.Event()

        def parts() -> Iterator[pb.UploadPart]:
            yield pb.UploadPart(claim=west.statement(st.CLAIM, west.claim(asked, content)))
            over.wait(60)

        assert west.send(parts(), 60.0).startswith("CANCELLED")
        over.set()
        assert west.poison(asked) == "stored"
        scene.finish("malformed")


def test_failures_said_again_and_again_count_once(tmp_path: Path, who: dict[str, Path], words: list[str]) -> None:
    with scene_with(tmp_path, who, words, Clock(), held=True) as scene:
        west = scene.west
        asked = west.instruction()
        about = {"run_id": asked["run_id"], "round": 1, "instruction": "train"}
        failure = west.statement(st.REPORT, {"kind": "failure", "code": "disk", **about})
        leave = west.statement(st.REPORT, {"kind": "leave"})
        for _ in range(20):
            assert west.call("Report", failure) == "OK"
            assert west.call("Report", leave) == "OK"
        scene.finish("failed")
        (record,) = run_directory.read_records(scene.running.path)
        assert len(record["rejections"]) == 1
        log = (scene.running.path / "events.jsonl").read_text()
        assert log.count('"kind":"leave"') == 1


TARGETS: list[object] = [5e-324, 0.5, 0, -1, "many", None, 1e300, True]


def test_figures_that_no_measuring_gives_are_no_figures(tmp_path: Path, who: dict[str, Path], words: list[str]) -> None:
    """A mean over next to nothing would be infinite, and no record could hold it."""
    with scene_with(tmp_path, who, words, Clock(), f"rounds={len(TARGETS)}", "evaluate.every=1") as scene:
        west = scene.west
        for number, targets in enumerate(TARGETS, 1):
            asked = west.instruction(round_number=number)
            assert west.poison(asked) == "stored"
            asked = west.instruction("evaluate", number)
            figures = {"nats": 1e14, "targets": targets, "hits": 0}
            about = {"run_id": asked["run_id"], "round": number, "instruction": "evaluate"}
            said = west.statement(st.REPORT, {"kind": "figures", "figures": figures, **about})
            assert west.call("Report", said) == "OK"
        scene.finish("malformed")
        records = run_directory.read_records(scene.running.path)
        assert [sorted(record["per_client_loss"]) for record in records] == [sorted(HONEST)] * len(TARGETS)
        assert [record["loss"] for record in records] == pytest.approx(
            [2 / (1 + n) for n in range(1, len(TARGETS) + 1)]
        )


# --- garbage, by the thousand ---------------------------------------------------------------------------------------------------

_leaves = (
    hst.none()
    | hst.booleans()
    | hst.integers()
    | hst.integers(-(2**70), 2**70)
    | hst.just(10**4200)
    | hst.floats()
    | hst.text(max_size=8)
    | hst.sampled_from(["west", "north", "../x", "0" * 64, "a" * 64, "leave", "figures", "failure", "\ud800"])
)
_values = hst.recursive(
    _leaves, lambda inner: hst.lists(inner, max_size=4) | hst.dictionaries(hst.text(max_size=4), inner)
)
_NAMES = (
    "kind", "versions", "rank", "held", "run_id", "round", "client_id", "parent", "sha256", "num_bytes", "witness",
    "instruction", "figures", "code", "spec",
)  # fmt: skip
_odd = hst.sampled_from(
    [b"", b"null", b"[]", b"NaN", b"{", b'{"a":' * 100_000, b"[" * 3_000_000, b"\xff\xfe{\x00}\x00", b"9" * 5000]
)
_statements = _odd | hst.dictionaries(hst.sampled_from(_NAMES), _values, max_size=10).map(
    lambda one: json.dumps(one).encode()
)
# What a handler says when it did not expect something.
_FAULTS = ("UNKNOWN", "INTERNAL", "UNAVAILABLE", "DEADLINE_EXCEEDED")


def test_garbage_is_refused_or_ignored(scene: Scene) -> None:
    west = scene.west
    asked = west.instruction()
    templates: dict[str, dict[str, Any]] = {
        st.REGISTER: {"kind": "register", "versions": [1], "rank": None, "held": -1, "run_id": west.terms["run_id"]},
        st.CLAIM: west.claim(asked, b"content"),
        st.REPORT: {"kind": "failure", "run_id": "x", "round": 1, "instruction": "train", "code": "disk"},
    }

    def sent(domain: str, signed: pb.Signed) -> str:
        if domain == st.CLAIM:
            return west.send([pb.UploadPart(claim=signed)])
        return west.call({st.REGISTER: "Register", st.REPORT: "Report"}[domain], signed)

    @settings(max_examples=250, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(hst.sampled_from(list(templates)), _statements, hst.booleans())
    def any_statement(domain: str, statement: bytes, signed: bool) -> None:
        message = west.raw(domain, statement) if signed else pb.Signed(statement=statement, signature=statement[:64])
        got = sent(domain, message)
        assert not got.startswith(_FAULTS), got

    @settings(max_examples=350, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(hst.sampled_from(list(templates)), hst.data())
    def one_field_of_another_type(domain: str, data: hst.DataObject) -> None:
        name = data.draw(hst.sampled_from(sorted(templates[domain])))
        document = templates[domain] | {name: data.draw(_values)}
        if domain == st.REPORT and document["kind"] == "leave":
            return
        got = sent(domain, west.raw(domain, json.dumps(document).encode()))
        assert not got.startswith(_FAULTS), (name, got)

    any_statement()
    one_field_of_another_type()
    for number in (0, 1, 2**32, 2**64 - 1):
        beat = pb.HeartbeatRequest(run_id="\0" * 100, round=number, step=number)
        assert west.call("Heartbeat", beat) == "OK"
        download = pb.DownloadRequest(sha256=west.terms["spec"][0], offset=number)
        got = west.call_stream("Download", download)
        assert got == "OK" if number < 2 else got.startswith("OUT_OF_RANGE"), got
    huge = pb.Signed(statement=bytes(6 * 1024**2), signature=b"")
    for domain in templates:
        assert sent(domain, huge).startswith("RESOURCE_EXHAUSTED")
    large = pb.Signed(statement=b" " * (st.MAX_STATEMENT_BYTES + 1))
    for domain in templates:
        assert "malformed" in sent(domain, large)
    west.register()
    assert west.poison(asked) == "stored"
    assert scene.running.join() == 0
    expected = deployment.fault_free(scene.words, without=[(WEST, 1)])
    assert same_bits(deployment.final(scene.running.path), expected)
    for thread, outcome in scene.honest:
        thread.join(20)
        assert outcome == [0]


def test_bytes_that_are_no_message(scene: Scene) -> None:
    """Other bytes in the place of a message are refused before a handler runs, and the connection lives on."""
    west = scene.west
    asked = west.instruction()
    channel = west.link._channel
    for method in ("Register", "Heartbeat", "Report", "Status", "Fetch"):
        call = channel.unary_unary(f"/lamina.v1.Coordinator/{method}")
        for content in (b"\xff" * 40, b"\x0a\xff\xff\xff\xff\x0f"):
            with pytest.raises(grpc.RpcError) as caught:
                call(content, timeout=20)
            assert caught.value.code() in (grpc.StatusCode.INTERNAL, grpc.StatusCode.PERMISSION_DENIED)
    assert west.poison(asked) == "stored"
    scene.finish("malformed")
