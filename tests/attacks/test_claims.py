"""Attack: an update that claims to be what it is not. Each is one counted rejection, and the round goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lamina.protos.adapter import LoraFactors
from lamina.protos.blobs import Blob
from lamina.protos.codec import encode_update
from lamina.protos.errors import QuorumNotReached
from lamina.protos.messages import Instruction, Reply, Update
from tests import federation
from tests.federation import (
    attacked,
    campaign,
    changed,
    reasons,
    reply,
    round_of,
    trained,
    with_dense,
    with_factors,
    without_the_attacker,
)
from tests.runs import same_bits

Q = "block.q_proj"


def poisoned(value: float) -> Callable[[Update], Update]:
    def made(update: Update) -> Update:
        factors = update.adapter.lora[Q]
        rows = factors.A.copy()
        rows[1, 2] = value
        return with_factors(update, Q, LoraFactors(rows, factors.B, factors.scale))

    return made


def poisoned_dense(update: Update) -> Update:
    return with_dense(update, "head.weight", np.full((2, 3), np.inf, np.float32))


def ranked(rank: int) -> Callable[[Update], Update]:
    def made(update: Update) -> Update:
        factors = LoraFactors(np.ones((rank, 7), np.float32), np.ones((9, rank), np.float32), 2.0)
        return with_factors(update, Q, factors)

    return made


def scaled(scale: float) -> Callable[[Update], Update]:
    def made(update: Update) -> Update:
        factors = update.adapter.lora[Q]
        return with_factors(update, Q, LoraFactors(factors.A, factors.B, scale))

    return made


def shaped(update: Update) -> Update:
    factors = update.adapter.lora[Q]
    return with_factors(update, Q, LoraFactors(factors.B.T.copy(), factors.A.T.copy(), factors.scale))


def renamed(name: str) -> Callable[[Update], Update]:
    return lambda update: with_factors(update, name, update.adapter.lora[Q])


def dropped(update: Update) -> Update:
    lora = {module: factors for module, factors in update.adapter.lora.items() if module != Q}
    return replace(update, adapter=replace(update.adapter, lora=lora))


ATTACKS: dict[str, tuple[str, Callable[[Update], Update]]] = {
    "not a number": ("non-finite", poisoned(np.nan)),
    "infinity": ("non-finite", poisoned(-np.inf)),
    "infinity in a head": ("non-finite", poisoned_dense),
    "another run": ("wrong-run", lambda u: replace(u, run_id="other")),
    "a past round": ("wrong-round", lambda u: replace(u, round=0)),
    "a future round": ("wrong-round", lambda u: replace(u, round=10**18)),
    "another client": ("wrong-client", lambda u: replace(u, client_id="0")),
    "a path as client": ("wrong-client", lambda u: replace(u, client_id="../../2")),
    "another release": ("wrong-parent", lambda u: replace(u, parent_release_hash="0" * 64)),
    "no examples": ("weight", lambda u: replace(u, num_examples=0)),
    "negative examples": ("weight", lambda u: replace(u, num_examples=-100)),
    "too many examples": ("weight", lambda u: replace(u, num_examples=10**9 + 1)),
    "absurdly many examples": ("weight", lambda u: replace(u, num_examples=10**300)),
    "a larger rank": ("rank", ranked(6)),
    "a smaller rank": ("rank", ranked(1)),
    "rank zero": ("rank", ranked(0)),
    "a rank above the shape": ("rank", ranked(40)),
    "a larger scale": ("rank", scaled(2000.0)),
    "factors swapped": ("schema", shaped),
    "an unknown module": ("schema", renamed("block.k_proj")),
    "a path as module": ("schema", renamed("../../../outside")),
    "a missing module": ("schema", dropped),
    "an unknown head": ("schema", lambda u: with_dense(u, "bias", np.zeros(2, np.float32))),
    "a head of another size": ("schema", lambda u: with_dense(u, "head.weight", np.zeros((3, 3), np.float32))),
    "a path as head": ("schema", lambda u: with_dense(u, "/tmp/head", np.zeros((2, 3), np.float32))),
}


@pytest.mark.parametrize("name", list(ATTACKS))
@pytest.mark.parametrize("strategy", ["recompress", "stack"])
def test_the_claim_is_rejected_and_the_round_goes_on(name: str, strategy: str) -> None:
    reason, attack = ATTACKS[name]
    one = campaign(strategy)
    after = attacked(one, lambda _, update: encode_update(attack(update), "fp32"))
    assert reasons(after) == [("2", reason)]
    assert after.record["clients"] == ["0", "1"]
    assert after.record["asked"] == ["0", "1", "2"]
    # Nothing of the attack is left: the state is that of a round without the attacker, and the weights sum to one.
    assert same_bits(after.state.adapter, without_the_attacker(one).state.adapter)
    assert sum(after.weights.values()) == pytest.approx(1.0)
    assert "2" not in after.held


def test_a_replayed_update_counts_once() -> None:
    one = campaign()

    def script(instructions: Sequence[Instruction]) -> Iterable[Reply]:
        for instruction in instructions:
            payload = encode_update(trained(one, instruction), "fp32")
            yield reply(instruction.client_id, payload)
            yield reply(instruction.client_id, payload)

    after = round_of(one, federation.Scripted(script))
    assert reasons(after) == [("0", "duplicate"), ("1", "duplicate"), ("2", "duplicate")]
    assert same_bits(after.state.adapter, federation.one_round(one).state.adapter)


def test_last_rounds_update_is_not_taken_again() -> None:
    one = campaign()
    kept: dict[str, bytes] = {}

    def attack(instruction: Instruction, update: Update) -> bytes:
        return kept.setdefault("first", encode_update(update, "fp32"))

    channel = federation.channel(one, {"2": federation.attacker(one, attack)})
    first = round_of(one, channel)
    second = round_of(one, channel, first)
    assert reasons(first) == []
    assert reasons(second) == [("2", "wrong-round")]


def test_a_stranger_and_a_client_that_was_not_asked_are_counted() -> None:
    one = campaign()

    def script(instructions: Sequence[Instruction]) -> Iterable[Reply]:
        for instruction in instructions:
            yield reply(instruction.client_id, encode_update(trained(one, instruction), "fp32"))
        update = trained(one, instructions[0])
        yield reply("ghost", changed(update, client_id="ghost"))
        yield reply("../../ghost", b"")

    after = round_of(one, federation.Scripted(script))
    assert [client for client, _ in reasons(after)] == ["ghost", "../../ghost"]
    assert same_bits(after.state.adapter, federation.one_round(one).state.adapter)


def test_a_client_cannot_speak_for_another() -> None:
    one = campaign()

    def script(instructions: Sequence[Instruction]) -> Iterable[Reply]:
        victim, thief = instructions[0], instructions[1]
        # The thief sends the victim's update under its own name before the victim answers.
        yield reply(thief.client_id, encode_update(trained(one, victim), "fp32"))
        yield reply(victim.client_id, encode_update(trained(one, victim), "fp32"))

    after = round_of(one, federation.Scripted(script))
    assert reasons(after) == [("1", "wrong-client")]
    assert after.record["clients"] == ["0"]


def test_a_failure_is_counted_with_what_the_client_says() -> None:
    one = campaign()
    after = federation.one_round(one, {"2": lambda i: Reply(i.client_id, None, "out of memory")})
    assert reasons(after) == [("2", "failed")]


def test_a_change_above_the_norm_bound_is_rejected() -> None:
    one = campaign(max_norm=8.0)

    def attack(_: Instruction, update: Update) -> bytes:
        factors = update.adapter.lora[Q]
        return encode_update(
            with_factors(update, Q, LoraFactors(factors.A * 30, factors.B * 30, factors.scale)), "fp32"
        )

    after = attacked(one, attack)
    assert reasons(after) == [("2", "norm")]


def test_only_attackers_end_the_round_by_quorum_and_say_why() -> None:
    one = campaign()
    nans = {
        client: federation.attacker(one, lambda _, u: encode_update(poisoned(np.nan)(u), "fp32")) for client in "012"
    }
    with pytest.raises(QuorumNotReached, match="non-finite"):
        federation.one_round(one, nans)


@pytest.mark.parametrize("order", [("0", "1", "2"), ("2", "0", "1"), ("1", "2", "0")])
def test_who_answers_first_changes_no_bit(order: tuple[str, ...]) -> None:
    one = campaign("stack")

    def script(instructions: Sequence[Instruction]) -> Iterable[Reply]:
        by_client = {instruction.client_id: instruction for instruction in instructions}
        for client in order:
            yield reply(client, encode_update(trained(one, by_client[client]), "fp32"))

    after = round_of(one, federation.Scripted(script))
    assert same_bits(after.state.adapter, federation.one_round(one).state.adapter)


def test_an_update_whose_file_was_swept_is_no_reply(tmp_path: Path) -> None:
    """It came for a round that is over, and a sweep was faster."""
    one = campaign()
    gone = Reply("2", Blob("ab" * 32, 1000, tmp_path / "gone"))
    found = federation.one_round(one, {"2": lambda instruction: gone})
    assert reasons(found) == []
    assert same_bits(found.state.adapter, without_the_attacker(one).state.adapter)
