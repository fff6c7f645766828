"""The engine in memory: what a round does to the global adapter, for every strategy and wire format."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lamina.client.loading import BaseOptions, load_base
from lamina.client.model import Base, put, take
from lamina.client.train import Task, completed, train
from lamina.protos.adapter import Adapter, product
from lamina.protos.codec import BYTES_PER_NUMBER, decode, decode_update
from lamina.protos.errors import QuorumNotReached
from lamina.protos.messages import Instruction, Reply
from lamina.server import campaign as campaigns
from lamina.server.channel import MemoryChannel
from lamina.server.rounds import Loop, run
from lamina.simulations import engine
from lamina.simulations.prepare import prepare
from lamina.strategies import STRATEGIES
from tests.runs import Listening, Memory, go_on, no_evaluation, play, same_bits, small

WIRES = ("fp32", "bf16", "fp16", "int8")


def gap(one: Adapter, other: Adapter) -> float:
    """Largest relative distance of products; modules that one lacks count as zero."""
    worst = 0.0
    for module in set(one.lora) | set(other.lora):
        first, second = (product(a.lora[module]) if module in a.lora else np.zeros(1) for a in (one, other))
        worst = max(worst, float(np.linalg.norm(first - second)) / max(1e-30, float(np.linalg.norm(second))))
    return worst


def test_one_clients_round_is_local_training_alone(llama: Path, notes: Path) -> None:
    config = small(llama, notes, "clients.count=1", "clients.ranks=4", "rounds=1", "aggregation.rank_cap=8")
    outcome = play(config)
    base = load_base(BaseOptions(str(llama), device="cpu"))
    site = outcome.cohort.sites["0"]
    task = Task("0", 1, 1, config.seed, config.train)
    start = completed(Adapter(), site.budget.train, site.budget.scale, task, base)
    put(base, start, None)
    train(base, site.examples, task, start)
    alone = take(base)
    assert max(np.abs(product(f)).max() for f in alone.lora.values()) > 1e-3
    assert gap(outcome.state.adapter, alone) < 1e-6


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("strategy", ["recompress", "residual", "stack"])
def test_idle_rounds_change_no_bit(llama: Path, notes: Path, strategy: str, wire: str) -> None:
    config = small(llama, notes, f"strategy={strategy}", f"wire.format={wire}", "clients.ranks=[4,2,1]")
    active = play(config)
    idle = go_on(active, more=3, learning_rate=0.0)
    assert len(idle.rounds) == 3
    assert max(np.abs(product(f)).max() for f in active.state.adapter.lora.values()) > 1e-3
    for adapter in idle.adapters:
        assert same_bits(adapter, active.state.adapter)
    assert all(completed.record["relative_error"] == 0.0 for completed in idle.rounds)


@pytest.mark.parametrize("wire", WIRES)
def test_an_idle_round_hands_back_what_was_received(llama: Path, notes: Path, wire: str) -> None:
    idle = go_on(play(small(llama, notes, f"wire.format={wire}", "rounds=1")), more=1, learning_rate=0.0)
    for update in idle.rounds[0].updates:
        release = idle.rounds[0].releases[update.client_id].trainable
        for module, factors in release.lora.items():
            sent = update.adapter.lora[module]
            assert sent.A[: factors.rank].tobytes() == factors.A.tobytes()
            assert sent.B[:, : factors.rank].tobytes() == factors.B.tobytes()
            assert not sent.B[:, factors.rank :].any()


@pytest.mark.parametrize("strategy", ["recompress", "stack"])
def test_every_slot_gets_a_gradient_within_two_steps(llama: Path, notes: Path, strategy: str) -> None:
    # A cap of 2 leaves a client of rank 6 with four fresh slots in round 2.
    config = small(
        llama, notes, f"strategy={strategy}", "clients.ranks=[6,3,1]", "aggregation.rank_cap=2", "train.local_steps=2"
    )
    outcome = play(config)
    for done in outcome.rounds:
        for update in done.updates:
            site = outcome.cohort.sites[update.client_id]
            task = Task(update.client_id, done.state.round, config.rounds, config.seed, config.train)
            release = done.releases[update.client_id].trainable
            start = completed(release, site.budget.train, site.budget.scale, task, outcome.prepared.base)
            assert set(update.adapter.lora) == set(outcome.prepared.base.spec.modules)
            for module, factors in update.adapter.lora.items():
                moved_a = np.abs(factors.A - start.lora[module].A).max(axis=1)
                moved_b = np.abs(factors.B - start.lora[module].B).max(axis=0)
                assert (moved_a > 0).all(), (done.state.round, update.client_id, module)
                assert (moved_b > 0).all(), (done.state.round, update.client_id, module)


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_loading_changes_no_product(llama: Path, notes: Path, rank: int) -> None:
    outcome = play(small(llama, notes, "rounds=1"))
    base = outcome.prepared.base
    site = outcome.cohort.sites["0"]
    budget = replace(
        site.budget, train=dict.fromkeys(base.spec.modules, rank), scale=dict.fromkeys(base.spec.modules, 0.5)
    )
    release = outcome.campaign.strategy.release(outcome.state, budget).trainable
    start = completed(release, budget.train, budget.scale, Task("0", 2, 2, 0, site.train), base)
    assert all(factors.rank == rank for factors in start.lora.values())
    assert all(np.array_equal(product(start.lora[m]), product(f)) for m, f in release.lora.items())
    put(base, start, None)
    assert same_bits(take(base), start)
    first = {m: start.lora[m].A for m in start.lora}
    other = completed(release, budget.train, budget.scale, Task("1", 2, 2, 0, site.train), base)
    fresh = [m for m in start.lora if rank > release.lora[m].rank]
    assert all(not np.array_equal(other.lora[m].A[-1], first[m][-1]) for m in fresh)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_learns_in_two_rounds(llama: Path, notes: Path, strategy: str) -> None:
    ranks = "clients.ranks=4" if strategy == "fedavg" else "clients.ranks=[4,2,1]"
    rate = 0.1 if strategy == "core" else 0.02  # of orthonormal factors, a step moves the product by rate x rank only
    words = [f"strategy={strategy}", ranks, "train.local_steps=8", f"train.learning_rate={rate}"]
    config = small(llama, notes, *words)
    prepared = prepare(config)
    base = engine.evaluate(prepared, Adapter(), config, "base").loss
    outcome = play(config, prepared)
    assert outcome.state.round == 2
    assert engine.evaluate(prepared, outcome.state.adapter, config, "end").loss < base - 0.2
    if outcome.campaign.strategy.exact and strategy != "recompress":
        assert max(done.record["relative_error"] for done in outcome.rounds) < 1e-6


def test_exact_strategies_agree_after_one_round(llama: Path, notes: Path) -> None:
    adapters = [
        play(small(llama, notes, f"strategy={name}", "rounds=1", "aggregation.rank_cap=7")).state.adapter
        for name in ("stack", "residual", "recompress")
    ]
    assert gap(adapters[0], adapters[1]) < 1e-6
    assert gap(adapters[0], adapters[2]) < 1e-6


@pytest.mark.parametrize("strategy", ["stack", "residual"])
def test_the_global_adapter_is_the_weighted_sum_of_what_was_sent(llama: Path, notes: Path, strategy: str) -> None:
    outcome = play(small(llama, notes, f"strategy={strategy}"))
    wanted = {module: np.zeros(shape) for module, shape in outcome.campaign.spec.modules.items()}
    for done in outcome.rounds:
        total = sum(update.num_examples for update in done.updates)
        assert {u.client_id: u.num_examples / total for u in done.updates} == pytest.approx(dict(done.weights))
        for update in done.updates:
            release = done.releases[update.client_id].trainable
            for module, factors in update.adapter.lora.items():
                start = product(release.lora[module]) if module in release.lora else 0.0
                wanted[module] += done.weights[update.client_id] * (product(factors) - start)
    for module, value in wanted.items():
        stored = product(outcome.state.adapter.lora[module])
        assert np.linalg.norm(stored - value) < 2e-6 * np.linalg.norm(value)


def test_num_examples_are_those_of_the_silo(llama: Path, notes: Path) -> None:
    outcome = play(small(llama, notes, "rounds=1"))
    counts = {update.client_id: update.num_examples for update in outcome.rounds[0].updates}
    assert counts == {client: len(examples) for client, examples in outcome.prepared.train.items()}
    assert len(set(counts.values())) == 3


def test_partial_participation_asks_a_share_and_changes_it(llama: Path, notes: Path) -> None:
    config = small(
        llama, notes, "clients.count=5", "clients.ranks=2", "clients.fraction=0.4", "rounds=6", "train.local_steps=1"
    )
    asked = [done.record["asked"] for done in play(config).rounds]
    assert all(len(one) == 2 for one in asked)
    assert len({tuple(one) for one in asked}) > 1


def test_who_drops_out_is_asked_and_sends_nothing(llama: Path, notes: Path) -> None:
    config = small(llama, notes, "clients.dropout_rate=0.3", "rounds=6", "train.local_steps=1", "seed=3")
    records = [done.record for done in play(config).rounds]
    assert all(record["asked"] == ["0", "1", "2"] for record in records)
    assert {len(record["clients"]) for record in records} - {3}
    assert all(record["rejections"] == [] for record in records)


def test_a_late_joiner_is_asked_from_its_round(llama: Path, notes: Path) -> None:
    config = small(llama, notes, "clients.join_round=[1,3,2]", "rounds=3", "train.local_steps=1")
    assert [done.record["asked"] for done in play(config).rounds] == [["0"], ["0", "2"], ["0", "1", "2"]]


def test_a_rank_of_zero_leaves_modules_alone(llama: Path, notes: Path) -> None:
    config = small(llama, notes)
    config.lora.rank_pattern = {"q_proj": 0, "layers.1.mlp.up_proj": 1}
    outcome = play(config)
    for module, factors in outcome.state.adapter.lora.items():
        assert (factors.rank == 0) == module.endswith("q_proj")
    for update in outcome.rounds[-1].updates:
        assert not [module for module in update.adapter.lora if module.endswith("q_proj")]
        assert update.adapter.lora["model.layers.1.mlp.up_proj"].rank == 1


def test_ranks_are_clamped_per_module(llama: Path, notes: Path) -> None:
    outcome = play(small(llama, notes, "clients.ranks=64", "rounds=1", "train.local_steps=1"))
    for module, factors in outcome.rounds[0].updates[0].adapter.lora.items():
        assert factors.rank == min(outcome.campaign.spec.modules[module])


# Bytes ----------------------------------------------------------------------------------------------------------------


def header_bytes(payload: bytes) -> int:
    return 8 + int.from_bytes(payload[:8], "little")


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("strategy", ["recompress", "residual", "stack"])
def test_bytes_are_those_that_travelled(llama: Path, notes: Path, strategy: str, wire: str) -> None:
    outcome = play(small(llama, notes, f"strategy={strategy}", f"wire.format={wire}"))
    for done in outcome.rounds:
        number = done.state.round
        sent = [one for one in outcome.channel.instructions if one.round == number]
        down = sum(one.num_bytes for one in sent)
        up = [
            reply.update.read() if reply.update else b"" for asked, reply in outcome.channel.replied if asked == number
        ]
        assert done.record["bytes_down"] == down
        assert done.record["bytes_up"] == sum(map(len, up))
        for payload in up:
            lora = decode_update(payload).adapter.lora.values()
            numbers = sum(f.rank * sum(f.shape) for f in lora)
            rows = sum(2 * f.rank for f in lora) if wire == "int8" else 0
            assert len(payload) - header_bytes(payload) == BYTES_PER_NUMBER[wire] * numbers + 4 * rows
            assert header_bytes(payload) < 16_000


def test_fewer_bits_are_fewer_bytes(llama: Path, notes: Path) -> None:
    up = {
        wire: play(small(llama, notes, f"wire.format={wire}", "rounds=1", "clients.ranks=16"))
        .rounds[0]
        .record["bytes_up"]
        for wire in WIRES
    }
    assert up["int8"] < up["bf16"] == up["fp16"] < up["fp32"]


# Seeds, copies, quorum ------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_bits_and_another_does_not(llama: Path, notes: Path) -> None:
    first, same, other = (play(small(llama, notes, f"seed={seed}", "wire.format=int8")) for seed in (0, 0, 1))
    assert same_bits(first.state.adapter, same.state.adapter)
    assert not same_bits(first.state.adapter, other.state.adapter)


def test_the_model_is_never_copied(llama: Path, notes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small(llama, notes, "strategy=stack")
    prepared = prepare(config)

    def refuse(self: torch.nn.Module, memo: object) -> None:
        pytest.fail("a module was copied")

    monkeypatch.setattr(torch.nn.Module, "__deepcopy__", refuse, raising=False)
    weights = {name: value.data_ptr() for name, value in base_weights(prepared.base)}
    before = {name: value.clone() for name, value in base_weights(prepared.base)}
    play(config, prepared)
    assert {name: value.data_ptr() for name, value in base_weights(prepared.base)} == weights
    assert all(torch.equal(value, before[name]) for name, value in base_weights(prepared.base))


def base_weights(base: Base) -> list[tuple[str, torch.Tensor]]:
    return [(name, value.data) for name, value in base.model.named_parameters() if "lora_" not in name]


def test_a_missed_quorum_keeps_the_rounds_before(llama: Path, notes: Path) -> None:
    config = small(llama, notes, "rounds=3", "clients.quorum=2")
    prepared = prepare(config)
    found = campaigns.budgets(config, prepared.base.spec)
    campaign = campaigns.campaign(config, prepared.base.spec, found, "run")
    outcome, store = play(config, prepared), Memory()
    cohort = replace(outcome.cohort, states={}, shared={})

    def leaving(instruction: Instruction) -> Reply | None:
        if instruction.round == 3 and instruction.client_id != "0":
            return None
        return next(iter(answered(Listening(cohort), instruction)), None)

    with pytest.raises(QuorumNotReached, match="round 3") as caught:
        run(Loop(campaign, MemoryChannel(dict.fromkeys(found, leaving)), no_evaluation, store))
    assert caught.value.exit_code == 3
    assert [done.state.round for done in store.completed] == [1, 2]
    assert same_bits(store.completed[-1].state.adapter, outcome.rounds[1].state.adapter)


def answered(channel: Listening, instruction: Instruction) -> list[Reply]:
    channel.offer([instruction])
    return list(channel.replies(None))


def test_a_record_is_json_and_has_its_keys(llama: Path, notes: Path) -> None:
    record = play(small(llama, notes, "rounds=1")).rounds[0].record
    wanted = "round clients rejections loss bytes_up bytes_down relative_error release_error seconds epsilon"
    assert set(wanted.split()) <= set(json.loads(json.dumps(record, allow_nan=False)))


def test_the_release_is_the_prefix_at_the_clients_scale(llama: Path, notes: Path) -> None:
    outcome = play(small(llama, notes, "lora.lora_alpha=8"))
    for instruction in [one for one in outcome.channel.instructions if one.round == 2]:
        budget = outcome.campaign.budgets[instruction.client_id]
        for module, factors in decode(instruction.release.read()).lora.items():
            assert factors.rank <= budget.train[module]
            assert factors.scale == pytest.approx(8 / budget.train[module])
