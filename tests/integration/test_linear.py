"""One factor a round with a model: what trains and what does not, what travels, and who receives both factors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lamina.client.model import put, trainable_parameters
from lamina.client.participant import ClientState, respond
from lamina.protos.adapter import Adapter, product
from lamina.protos.blobs import blob
from lamina.protos.codec import BYTES_PER_NUMBER, decode, decode_update, encode
from lamina.protos.errors import AdapterMismatch
from lamina.protos.messages import Instruction
from lamina.protos.sides import side_of, start_rows
from lamina.server.store.base import Completed
from lamina.simulations.prepare import prepare
from tests.runs import Outcome, classification, go_on, play, same_bits, small

LINEAR = ("ffa", "alternate")
WIRES = ("fp32", "bf16", "fp16", "int8")


def turn(strategy: str, round_number: int) -> str:
    return "B" if strategy == "ffa" or round_number % 2 else "A"


def body(payload: bytes) -> int:
    """Bytes of numbers, after the header."""
    return len(payload) - 8 - int.from_bytes(payload[:8], "little")


def exact_target(outcome: Outcome, done: Completed, before: Adapter | None, module: str) -> np.ndarray:
    target = np.zeros(outcome.campaign.spec.modules[module]) if before is None else product(before.lora[module])
    for update in done.updates:
        start = done.releases[update.client_id].trainable.lora[module]
        target = target + done.weights[update.client_id] * (product(update.adapter.lora[module]) - product(start))
    return target


@pytest.mark.parametrize("words", [[], ["lora.lora_alpha=8"], ["clients.fraction=0.7", "clients.join_round=[1,1,3]"]])
@pytest.mark.parametrize("strategy", LINEAR)
def test_rounds_are_exact_with_a_model(llama: Path, notes: Path, strategy: str, words: list[str]) -> None:
    outcome = play(small(llama, notes, f"strategy={strategy}", "rounds=4", *words))
    before = None
    for done in outcome.rounds:
        assert done.record["relative_error"] < 1e-6
        for module, stored in done.state.adapter.lora.items():
            target = exact_target(outcome, done, before, module)
            assert np.linalg.norm(product(stored) - target) <= 1e-6 * np.linalg.norm(target)
            if strategy == "ffa":
                d_in = outcome.campaign.spec.modules[module][1]
                assert np.array_equal(stored.A, start_rows(0, module, stored.rank, d_in))
        before = done.state.adapter


@pytest.mark.parametrize("strategy", LINEAR)
def test_one_factor_trains_and_alone_is_sent(llama: Path, notes: Path, strategy: str) -> None:
    outcome = play(small(llama, notes, f"strategy={strategy}", "rounds=3"))
    for number, reply in outcome.channel.replied:
        assert reply.update is not None
        adapter = decode_update(reply.update.read()).adapter
        assert side_of(adapter, "") == turn(strategy, number)
        start = outcome.rounds[number - 1].releases[reply.client_id].trainable
        for module, factors in adapter.lora.items():
            side = turn(strategy, number)
            # While B is 0 no other factor gets a gradient; that is why B is first.
            assert not np.array_equal(getattr(factors, side), getattr(start.lora[module], side))
    for instruction in outcome.channel.instructions:
        assert instruction.train == turn(strategy, instruction.round)


def test_the_optimizer_sees_only_what_trains(llama: Path, notes: Path) -> None:
    outcome = play(small(llama, notes, "strategy=ffa", "rounds=1"))
    base = outcome.prepared.base
    for side in "AB":
        put(base, outcome.state.adapter, None, sides=side)
        assert set(trainable_parameters(base)) == {f"{module}.lora_{side}" for module in base.spec.modules}


@pytest.mark.parametrize("strategy", LINEAR)
@pytest.mark.parametrize("wire", WIRES)
def test_idle_rounds_change_no_bit(llama: Path, notes: Path, strategy: str, wire: str) -> None:
    active = play(small(llama, notes, f"strategy={strategy}", f"wire.format={wire}", "rounds=3"))
    idle = go_on(active, more=3, learning_rate=0.0)
    assert max(np.abs(product(f)).max() for f in active.state.adapter.lora.values()) > 1e-3
    for adapter in idle.adapters:
        assert same_bits(adapter, active.state.adapter)


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("strategy", LINEAR)
def test_bytes_are_those_of_one_factor(llama: Path, notes: Path, strategy: str, wire: str) -> None:
    outcome = play(small(llama, notes, f"strategy={strategy}", f"wire.format={wire}", "rounds=4"))
    spec, budgets = outcome.campaign.spec, outcome.campaign.budgets
    for done in outcome.rounds:
        number = done.state.round
        mine = [one for one in outcome.channel.instructions if one.round == number]
        ups = [
            reply.update.read() for at, reply in outcome.channel.replied if at == number and reply.update is not None
        ]
        assert done.record["bytes_up"] == sum(map(len, ups))
        assert done.record["bytes_down"] == sum(one.release.num_bytes for one in mine)
        sides = {"A": 1, "B": 0}
        for client in budgets:
            trained = sum(r * spec.modules[m][sides[turn(strategy, number)]] for m, r in budgets[client].train.items())
            rows = 2 * sum(budgets[client].train.values()) if wire == "int8" else 0
            (up,) = (u for u in ups if decode_update(u).client_id == client)
            assert body(up) == BYTES_PER_NUMBER[wire] * trained + 4 * rows
            (down,) = (body(one.release.read()) for one in mine if one.client_id == client)
            sent = turn(strategy, number - 1)
            numbers = sum(r * spec.modules[m][sides[sent]] for m, r in budgets[client].train.items())
            assert down == (0 if number == 1 else BYTES_PER_NUMBER[wire] * numbers + 4 * rows)


def test_a_skipper_receives_both_factors(llama: Path, notes: Path) -> None:
    outcome = play(small(llama, notes, "strategy=alternate", "rounds=4", "clients.join_round=[1,4,1]"))
    last = {one.client_id: one for one in outcome.channel.instructions if one.round == 4}
    before = {one.client_id: one for one in outcome.channel.instructions if one.round == 3}
    assert last["0"].frozen is not None
    assert last["0"].frozen.sha256 == before["0"].release.sha256
    assert last["1"].frozen is not None
    assert {side_of(decode(part.read()), "") for part in (last["1"].release, last["1"].frozen)} == {"A", "B"}
    wanted = last["0"].release.num_bytes + last["2"].release.num_bytes + last["1"].num_bytes
    assert outcome.rounds[-1].record["bytes_down"] == wanted
    release = outcome.rounds[-1].releases["1"].trainable
    for module, factors in outcome.rounds[-2].state.adapter.lora.items():
        got = release.lora[module]
        assert np.array_equal(got.A, factors.A[: got.rank])
        assert np.array_equal(got.B, factors.B[:, : got.rank])


@pytest.mark.parametrize("strategy", LINEAR)
def test_heads_are_averaged_beside(bert: Path, questions: Path, strategy: str) -> None:
    """Dense parameters move in every round; what a client was sent a round ago it still has, head included."""
    outcome = play(classification(bert, questions, f"strategy={strategy}", "rounds=4"))
    dense = outcome.campaign.spec.dense
    for number, done in enumerate(outcome.rounds, 1):
        for name, before in dense.items():
            wanted = before.astype(np.float64)
            for update in done.updates:
                start = done.releases[update.client_id].trainable.dense[name]
                assert np.array_equal(start, before)
                wanted = wanted + done.weights[update.client_id] * (
                    update.adapter.dense[name].astype(np.float64) - start
                )
            assert np.abs(done.state.adapter.dense[name] - wanted).max() < 1e-6
        dense = done.state.adapter.dense
        mine = {one.client_id: one for one in outcome.channel.instructions if one.round == number}
        if strategy == "alternate" and number > 2:
            earlier = {one.client_id: one for one in outcome.channel.instructions if one.round == number - 1}
            for client, one in mine.items():
                assert one.frozen is not None
                assert one.frozen.sha256 == earlier[client].release.sha256


def test_kept_moments_are_those_of_b(llama: Path, notes: Path) -> None:
    words = ["strategy=ffa", "train.schedule=constant"]
    kept = play(small(llama, notes, *words, "train.keep_optimizer=true"))
    dropped = play(small(llama, notes, *words))
    for state in kept.cohort.states.values():
        assert state.optimizer
        assert all(name.rsplit("/", 1)[0].endswith("lora_B") for name in state.optimizer)
    assert not same_bits(kept.state.adapter, dropped.state.adapter)


def asked(outcome: Outcome, train: str, release: Adapter, frozen: Adapter | None = None) -> Instruction:
    parts = [None if part is None else blob(encode(part, "fp32")) for part in (release, frozen)]
    assert parts[0] is not None
    return Instruction("run", 2, "0", parts[0], parts[1], 1, train=train)  # type: ignore[arg-type]


def test_a_site_refuses_parts_that_do_not_make_a_whole(llama: Path, notes: Path) -> None:
    config = small(llama, notes, "strategy=alternate", "rounds=3")
    outcome = play(config, prepare(config))
    (last,) = [one for one in outcome.channel.instructions if one.round == 3 and one.client_id == "0"]
    assert last.frozen is not None
    rows, columns = decode(last.release.read()), decode(last.frozen.read())
    both = outcome.rounds[-1].releases["0"].trainable
    (low,) = [one.release for one in outcome.channel.instructions if one.round == 3 and one.client_id == "1"]
    wrong = [
        (asked(outcome, "core", rows, columns), "core"),
        (asked(outcome, "B", rows, rows), "each factor once"),
        (asked(outcome, "B", both), "one factor"),
        (asked(outcome, "B", decode(low.read())), "each factor once"),
        (asked(outcome, "B", Adapter({"nowhere": next(iter(rows.lora.values()))})), "nowhere"),
    ]
    site = outcome.cohort.sites["0"]
    for instruction, said in wrong:
        with pytest.raises(AdapterMismatch, match=said):
            respond(site, outcome.prepared.base, ClientState(), instruction, {})
    respond(site, outcome.prepared.base, ClientState(), asked(outcome, "B", rows, columns), {})
