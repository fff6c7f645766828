"""`stack`: whoever joins late or skips a round holds, in all, the same global adapter as everyone else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lamina.client.frozen import Frozen, added
from lamina.protos.adapter import Adapter, LoraFactors, product
from tests.runs import Outcome, play, small


def held(frozen: Frozen, module: str) -> np.ndarray:
    parts = [tensor.double().numpy() for tensor in frozen.parts[module]]
    return parts[0] if len(parts) == 1 else parts[1] @ parts[0]


def gaps(outcome: Outcome) -> dict[str, tuple[int, float]]:
    """Client id -> the version that it holds, and how far its frozen part is from the global adapter of that version."""
    found = {}
    for client, state in outcome.cohort.states.items():
        if state.frozen is None:
            continue
        wanted = outcome.adapters[state.version - 1]
        worst = 0.0
        for module, factors in wanted.lora.items():
            target = product(factors)
            worst = max(worst, float(np.linalg.norm(held(state.frozen, module) - target) / np.linalg.norm(target)))
        found[client] = (state.version, worst)
    return found


@pytest.mark.parametrize(
    "words",
    [
        ["clients.join_round=[1,3,4]"],
        ["clients.fraction=0.5", "clients.count=4", "clients.ranks=[4,2,2,1]"],
        ["clients.dropout_rate=0.3", "seed=3"],
        ["clients.join_round=[1,2,3]", "clients.fraction=0.7", "seed=1"],
        ["aggregation.learning_rate=0.5", "clients.fraction=0.6"],
        ["aggregation.weights=uniform", "lora.lora_alpha=4", "clients.join_round=[1,1,4]"],
    ],
)
def test_what_is_held_adds_up_to_the_global_adapter(llama: Path, notes: Path, words: list[str]) -> None:
    outcome = play(small(llama, notes, "strategy=stack", "rounds=5", "train.local_steps=1", *words))
    found = gaps(outcome)
    assert found
    for client, (version, gap) in found.items():
        assert gap < 1e-5, (client, version)


def test_a_skipper_receives_all_and_the_steady_one_an_increment(llama: Path, notes: Path) -> None:
    outcome = play(
        small(llama, notes, "strategy=stack", "rounds=4", "train.local_steps=1", "clients.join_round=[1,4,1]")
    )
    last = {one.client_id: one for one in outcome.channel.instructions if one.round == 4}
    assert last["0"].frozen_since == 2
    assert last["1"].frozen_since is None
    assert {client: version for client, (version, _) in gaps(outcome).items()} == {"0": 3, "1": 3, "2": 3}
    assert {outcome.cohort.states[client].version for client in "012"} == {3}


def test_clients_with_one_history_share_one_frozen_part(llama: Path, notes: Path) -> None:
    outcome = play(small(llama, notes, "strategy=stack", "rounds=3", "train.local_steps=1"))
    parts = [outcome.cohort.states[client].frozen for client in "012"]
    assert parts[0] is not None
    assert parts[0] is parts[1] is parts[2]
    assert len(outcome.cohort.shared) == 1


@pytest.mark.parametrize("strategy", ["recompress", "residual"])
def test_the_others_keep_nothing_frozen(llama: Path, notes: Path, strategy: str) -> None:
    outcome = play(small(llama, notes, f"strategy={strategy}", "rounds=2", "train.local_steps=1"))
    assert all(state.frozen is None for state in outcome.cohort.states.values())


def test_a_residual_client_sees_all_of_the_global_adapter(llama: Path, notes: Path) -> None:
    words = ["strategy=residual", "rounds=3", "train.local_steps=1", "clients.download_rank=64"]
    outcome = play(small(llama, notes, *words))
    for done, before in zip(outcome.rounds[1:], outcome.adapters, strict=False):
        for release in done.releases.values():
            for module, factors in before.lora.items():
                assert release.frozen is not None
                seen = product(release.trainable.lora[module]) + product(release.frozen.lora[module])
                wanted = product(factors)
                assert np.linalg.norm(seen - wanted) < 1e-6 * np.linalg.norm(wanted)
        assert done.record["release_error"] < 1e-6


@pytest.mark.parametrize("ranks", [(1, 1), (2, 3), (3, 6), (6, 6, 6)])
def test_a_frozen_part_is_a_matrix_where_that_is_smaller(ranks: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    frozen, total, columns = None, np.zeros((9, 7)), 0
    for rank in ranks:
        factors = LoraFactors(
            rng.normal(size=(rank, 7)).astype(np.float32), rng.normal(size=(9, rank)).astype(np.float32), 1.5
        )
        frozen = added(frozen, Adapter({"m": factors}))
        total += product(factors)
        columns += rank
        assert np.linalg.norm(held(frozen, "m") - total) < 1e-6 * np.linalg.norm(total)
        numbers = sum(tensor.numel() for tensor in frozen.parts["m"])
        assert numbers <= min(columns * 16, 63)
