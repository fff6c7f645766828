"""One factor a round with a model: what trains and what does not, what travels, and who receives both factors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from lamina.client.model import core_of, put, take, trainable_parameters
from lamina.client.participant import ClientState, respond
from lamina.protos.adapter import Adapter, product
from lamina.protos.blobs import blob
from lamina.protos.codec import BYTES_PER_NUMBER, decode, decode_update, encode
from lamina.protos.errors import AdapterMismatch
from lamina.protos.messages import Instruction
from lamina.protos.sides import one_side, side_of, start_factors, start_rows
from lamina.server.store.base import Completed
from lamina.simulations.prepare import prepare
from tests.runs import Outcome, classification, go_on, play, same_bits, small

LINEAR = ("ffa", "alternate", "core")
WIRES = ("fp32", "bf16", "fp16", "int8")


def turn(strategy: str, round_number: int) -> str:
    if strategy == "core":
        return "core"
    return "B" if strategy == "ffa" or round_number % 2 else "A"


def size_of(shape: tuple[int, int], rank: int, side: str) -> int:
    return rank * {"A": shape[1], "B": shape[0], "core": rank}[side]


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
            if strategy == "core":
                start = start_factors(0, module, stored.rank, outcome.campaign.spec.modules[module], 2.0, cored=True)
                assert np.array_equal(stored.A, start.A)
                assert np.array_equal(stored.B, start.B)
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
            # While B is 0 no other factor gets a gradient; that is why B is first. A core does at 0, B and A being frozen.
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
        for client in budgets:
            side = turn(strategy, number)
            trained = sum(size_of(spec.modules[m], r, side) for m, r in budgets[client].train.items())
            rows = sum(budgets[client].train.values()) if wire == "int8" else 0
            (up,) = (u for u in ups if decode_update(u).client_id == client)
            assert body(up) == BYTES_PER_NUMBER[wire] * trained + 4 * rows
            (down,) = (body(one.release.read()) for one in mine if one.client_id == client)
            sent = turn(strategy, number - 1)
            numbers = sum(size_of(spec.modules[m], r, sent) for m, r in budgets[client].train.items())
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


@pytest.mark.parametrize(("strategy", "side"), [("ffa", "lora_B"), ("core", "lora_core")])
def test_kept_moments_are_those_of_what_trains(llama: Path, notes: Path, strategy: str, side: str) -> None:
    words = [f"strategy={strategy}", "train.schedule=constant"]
    kept = play(small(llama, notes, *words, "train.keep_optimizer=true"))
    dropped = play(small(llama, notes, *words))
    for state in kept.cohort.states.values():
        assert state.optimizer
        assert all(name.rsplit("/", 1)[0].endswith(side) for name in state.optimizer)
    assert not same_bits(kept.state.adapter, dropped.state.adapter)


def test_a_core_is_a_linear_layer_of_its_own_between_the_factors(llama: Path, notes: Path) -> None:
    """What a module computes, and the gradient of the core, s B' G A', by matrices in float64; no other layer trains."""
    outcome = play(small(llama, notes, "strategy=core", "rounds=1"))
    base, adapter = outcome.prepared.base, outcome.state.adapter
    put(base, adapter, None, sides="core")
    assert same_bits(take(base), adapter)
    assert set(trainable_parameters(base)) == {f"{module}.lora_core" for module in base.spec.modules}
    trained = [one for one in base.model.modules() if any(p.requires_grad for p in one.parameters(recurse=False))]
    assert {type(one) for one in trained} == {torch.nn.Linear}
    assert all(one.bias is None and one.in_features == one.out_features == 4 for one in trained)
    module, (d_out, d_in) = next(iter(base.spec.modules.items()))
    layer, f = base.layer(module), adapter.lora[module]
    x, g = torch.randn(3, d_in), torch.randn(3, d_out)
    wanted = layer.base_layer(x).detach().double().numpy() + x.double().numpy() @ product(f).T
    got = layer(x)
    assert np.linalg.norm(got.detach().numpy() - wanted) <= 1e-6 * np.linalg.norm(wanted)
    (got * g).sum().backward()
    gradient = f.scale * f.B.T.astype(np.float64) @ (g.double().T @ x.double()).numpy() @ f.A.T
    core = core_of(layer.lora_B["default"])
    assert core is not None
    assert core.weight.grad is not None
    assert np.linalg.norm(core.weight.grad.numpy() - gradient) <= 1e-5 * np.linalg.norm(gradient)
    put(base, Adapter(), None)
    assert core_of(layer.lora_B["default"]) is None


def test_the_proximal_term_of_a_core_pulls_towards_the_release(llama: Path, notes: Path) -> None:
    near, far = (
        play(small(llama, notes, "strategy=core", "rounds=1", f"train.proximal={mu}", "train.local_steps=6"))
        for mu in (100, 0)
    )
    sizes = [sum(np.linalg.norm(product(f)) for f in one.state.adapter.lora.values()) for one in (near, far)]
    assert sizes[0] < 0.5 * sizes[1]


def test_a_core_of_another_kind_of_round_is_refused(llama: Path, notes: Path) -> None:
    config = small(llama, notes, "strategy=core", "rounds=2")
    outcome = play(config, prepare(config))
    (last,) = [one for one in outcome.channel.instructions if one.round == 2 and one.client_id == "0"]
    cores, whole = decode(last.release.read()), outcome.rounds[-1].releases["0"].trainable
    columns = Adapter({module: one_side(f, "B") for module, f in whole.lora.items()})
    site = outcome.cohort.sites["0"]
    wrong = [
        (asked(outcome, "B", cores), "each factor once"),
        (asked(outcome, "AB", cores), "lora_core"),
        (asked(outcome, "core", columns), "each factor once"),
        (asked(outcome, "core", whole), "one factor"),
        (asked(outcome, "core", cores, cores), "each factor once"),
    ]
    for instruction, said in wrong:
        with pytest.raises(AdapterMismatch, match=said):
            respond(site, outcome.prepared.base, ClientState(), instruction, {})


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
        (asked(outcome, "core", rows, columns), "each factor once"),
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
