"""Attack: any bytes as an update. Decoding and admission give an update that fits, or `UpdateRejected`, from memory and from a
file alike, within bounded memory. What was found once is kept in `corpus/` and tried at every run.
"""

from __future__ import annotations

import collections
import os
import random
import re
import resource
import time
import tracemalloc
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from lamina.protos.adapter import is_finite
from lamina.protos.blobs import Blob, blob
from lamina.protos.codec import WIRE_FORMATS, decode, decode_update, encode_update, opened, opened_update
from lamina.protos.errors import UpdateRejected
from lamina.protos.messages import Update
from lamina.server.admission import MAX_EXAMPLES, admit, size_cap_bytes
from tests.attacks.fuzz.mutate import HONEST, MUTATIONS, NAMES, RANK, expected, mutated, spec
from tests.runs import same_bits

CORPUS = Path(__file__).parent / "corpus"
REASONS = {
    "too-large", "malformed", "wrong-run", "wrong-round", "wrong-client", "wrong-parent", "schema", "rank", "non-finite",
    "weight", "norm",
}  # fmt: skip
# Beyond the payload itself: Python's objects for a header of a megabyte, and no array that a header only speaks of.
MEMORY_BYTES = 24 * 1024**2
_NAMES = re.compile("|".join(re.escape(name) for name in sorted(NAMES, key=len, reverse=True) if name))
EXPECTED, CAP = expected(), size_cap_bytes(spec(), expected().budget)


@dataclass
class Outcome:
    """What became of one payload.

    Attributes:
        reason: Of the refusal, or `admitted`.
        message: Of the refusal.
    """

    reason: str
    message: str = ""
    update: Update | None = None

    @property
    def kind(self) -> str:
        """The refusal without what differs from payload to payload."""
        text = _NAMES.sub("", re.sub(r"'[^']*'|\"[^\"]*\"|\[[^\]]*\]|\([^)]*\)|`[^`]*`", "", self.message))
        words = re.findall(r"\b[a-z]+\b", re.sub(r"at line [0-9]+.*|of format .*", "", text))
        return f"{self.reason}: {' '.join(words[:14])}"


def judged(content: Blob) -> Outcome:
    try:
        update = admit(content, EXPECTED, set())
    except UpdateRejected as error:
        return Outcome(error.reason, str(error))
    return Outcome("admitted", "", update)


def tried(payload: bytes, path: Path) -> Outcome:
    """All ways to read a payload; raises whatever is not as it should be."""
    path.write_bytes(payload)
    in_memory = blob(payload)
    in_file = Blob(in_memory.sha256, len(payload), path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for read in (decode, decode_update):
            try:
                read(payload)
            except UpdateRejected:
                continue
        for lazy in (opened, opened_update):
            try:
                found = lazy(in_file)
                adapter = found.adapter if isinstance(found, Update) else found
                for values in (adapter.lora, adapter.dense):
                    for name in values:
                        values[name]
            except UpdateRejected:
                continue
        first, second = judged(in_memory), judged(in_file)
    assert first.reason == second.reason, (first, second)
    if first.update is not None and second.update is not None:
        fits(first.update)
        assert same_bits(first.update.adapter, second.update.adapter)
        again = judged(blob(encode_update(first.update, "fp32")))
        assert again.reason == "admitted"
    return second


def fits(update: Update) -> None:
    """What aggregation relies on."""
    assert (update.run_id, update.round, update.client_id) == ("run", 3, "site")
    assert 1 <= update.num_examples <= MAX_EXAMPLES
    assert type(update.num_examples) is int
    assert is_finite(update.adapter)
    assert set(update.adapter.lora) == {"a.q", "b.up"}
    assert {name: value.shape for name, value in update.adapter.dense.items()} == {"head": (2, 3), "bias": (3,)}
    for module, factors in update.adapter.lora.items():
        assert factors.A.shape == (RANK, spec().modules[module][1])
        assert factors.B.shape == (spec().modules[module][0], RANK)
        assert factors.A.dtype == factors.B.dtype == np.float32
        assert factors.scale == 2.0
    assert all(isinstance(value, float) for value in update.metrics.values())


@dataclass
class Found:
    """What a campaign has seen."""

    reasons: collections.Counter[str] = field(default_factory=collections.Counter)
    mutations: collections.Counter[str] = field(default_factory=collections.Counter)
    kinds: dict[str, bytes] = field(default_factory=dict)
    tries: int = 0


def campaign(seed: int, cpu_s: float, folder: Path) -> Found:
    """Try payloads until so much of the processor's time is used; one that is not refused properly is kept in the corpus."""
    rng, found, started = random.Random(seed), Found(), time.process_time()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    while time.process_time() - started < cpu_s:
        payload, names = mutated(rng)
        watched = found.tries % 97 == 0
        if watched:
            tracemalloc.start()
        try:
            outcome = tried(payload, folder / "payload")
        except BaseException as error:
            name = f"crash-{blob(payload).sha256[:12]}"
            (CORPUS / name).write_bytes(payload)
            raise AssertionError(
                f"seed {seed}, try {found.tries}, {names}: {error!r}; kept as {CORPUS / name}"
            ) from error
        finally:
            peak = tracemalloc.get_traced_memory()[1] if watched else 0
            if watched:
                tracemalloc.stop()
        assert peak < MEMORY_BYTES + 8 * len(payload), (seed, found.tries, peak, len(payload))
        found.tries += 1
        found.reasons[outcome.reason] += 1
        found.mutations.update(names)
        known = found.kinds.get(outcome.kind)
        if known is None or len(payload) < len(known):
            found.kinds[outcome.kind] = payload
    # In units of 1024 bytes: nothing outside Python's own count has grown either.
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < 128 * 1024**2, grown
    assert found.reasons.keys() <= REASONS | {"admitted"}
    return found


def test_the_honest_update_is_admitted_in_every_format(tmp_path: Path) -> None:
    assert {wire: tried(HONEST[wire], tmp_path / "payload").reason for wire in WIRE_FORMATS} == dict.fromkeys(
        WIRE_FORMATS, "admitted"
    )


def test_any_bytes_are_an_update_or_refused(tmp_path: Path) -> None:
    found = campaign(20_260_301, 8.0, tmp_path)
    # The mutator reaches what it is meant to reach: every reason, by every mutation.
    assert found.reasons.keys() == REASONS | {"admitted"}
    assert found.mutations.keys() == MUTATIONS.keys()


@pytest.mark.long
def test_any_bytes_for_ten_minutes_of_a_processor(tmp_path: Path) -> None:
    seed = int(os.environ.get("LAMINA_FUZZ_SEED") or time.time_ns() % 2**32)
    found = campaign(seed, 600.0, tmp_path)
    print(f"seed {seed}: {found.tries} payloads, {len(found.kinds)} kinds of outcome, {dict(found.reasons)}")
    assert found.reasons.keys() == REASONS | {"admitted"}


@pytest.mark.parametrize("path", sorted(CORPUS.glob("*")), ids=lambda path: path.name)
def test_what_was_found_before(path: Path, tmp_path: Path) -> None:
    """A file's name begins with what must become of it; `crash` is what was once neither admitted nor refused."""
    outcome = tried(path.read_bytes(), tmp_path / "payload")
    wanted = path.name.partition(".")[0].rstrip("0123456789").rstrip("-")
    assert outcome.reason in REASONS if path.name.startswith("crash") else outcome.reason == wanted


def test_the_corpus_is_there() -> None:
    names = {path.name.partition(".")[0].rstrip("0123456789").rstrip("-") for path in CORPUS.glob("*")}
    assert names >= REASONS - {"too-large"} | {"admitted"}  # which would take a megabyte
    assert len(mutated(random.Random(1))[0]) > 0
    assert CAP < 2 * 1024**2
