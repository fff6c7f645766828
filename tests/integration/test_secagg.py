"""Rounds whose updates are summed: the same adapter as in the clear, with dropouts after every message, and never two sums."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from lamina.protos.adapter import Adapter
from lamina.protos.errors import ConfigError, QuorumNotReached
from lamina.protos.secagg.encoding import encoding
from lamina.protos.secagg.messages import Advertisement, Masked, Revealed
from lamina.server.store.base import Store
from tests.deployment import config_of, fault_free
from tests.summing import SIX, Federation, words

CLEAR = ("privacy.secagg=false", "aggregation.full_weight=null")


def farthest(one: Adapter, other: Adapter) -> float:
    """The largest distance of two numbers, over factors and dense parameters."""
    found = [0.0]
    for module, factors in one.lora.items():
        theirs = other.lora[module]
        pairs = ((factors.A, theirs.A), (factors.B, theirs.B), (factors.core, theirs.core))
        found += [float(np.abs(a - b).max()) for a, b in pairs if a is not None and b is not None]
    found += [float(np.abs(value - other.dense[name]).max()) for name, value in one.dense.items()]
    return max(found)


def allowed(rounds: int, count: int = len(SIX), bound: float = 1.0) -> float:
    """Steps of the encoding over a smallest mean weight of 14 / 20, and float32 of numbers around 1."""
    return rounds * (encoding(bound, count).step / (13 / 20) + 2.0**-23) * 2


@pytest.mark.parametrize("weights", ["num_examples", "uniform"])
@pytest.mark.parametrize("strategy", ["ffa", "alternate", "core"])
def test_the_adapter_is_that_of_updates_in_the_clear(strategy: str, weights: str) -> None:
    more = (f"strategy={strategy}", f"aggregation.weights={weights}", "aggregation.learning_rate=0.7")
    bound = 8.0 if strategy == "core" else 1.0  # these cores move farther
    masked = Federation(words(*more, f"privacy.secagg_range={bound}")).play().adapter
    assert farthest(masked, fault_free(words(*more, *CLEAR))) <= allowed(3, bound=bound)


@pytest.mark.parametrize("wire", ["bf16", "int8"])
def test_releases_of_any_wire_format_are_what_changes_are_taken_from(wire: str) -> None:
    one = Federation(words("strategy=alternate", f"wire.format={wire}"))
    state = one.play()
    assert all(done.record["relative_error"] < 1e-6 for done in one.store.rounds)
    idle = [done.record["bytes_up"] for done in one.store.rounds]
    # 4 bytes a number: B of rank 4 in odd rounds, A in even ones, the head, and the weight.
    assert idle == [6 * 4 * (4 * n + 6 + 1) for n in (24 + 16, 16 + 32, 24 + 16)]
    assert state.round == 3


@pytest.mark.parametrize("messages", [-1, 0, 1, 2, 3, 4])
def test_a_client_may_drop_out_after_any_message(messages: int) -> None:
    one = Federation(words("rounds=2"), dropped={("cedar", 1): messages})
    state = one.play()
    counts = messages >= 3  # its vector had come
    missing = [] if counts else [("cedar", 1)]
    assert farthest(state.adapter, fault_free(words("rounds=2", *CLEAR), without=missing)) <= allowed(2)
    first, second = (done.record["clients"] for done in one.store.rounds)
    assert first == [name for name in SIX if counts or name != "cedar"]
    assert second == list(SIX)


def test_two_that_are_lost_in_the_first_attempt_are_left_out_of_the_next() -> None:
    # Six need five. Two send keys and shares and no vector: the attempt is given up, and the other four make another.
    dropped = {("amber", 1): 2, ("fern", 1): 2}
    one = Federation(words("rounds=1"), dropped=dropped)
    state = one.play()
    assert one.store.rounds[0].record["clients"] == ["birch", "cedar", "dune", "elm"]
    assert farthest(state.adapter, fault_free(words("rounds=1", *CLEAR), without=list(dropped))) <= allowed(1)
    nonces = {told.context.nonce for _, told in one.told if hasattr(told, "context")}
    assert len(nonces) == 2
    keys = [said.mask_key for said in one.said if isinstance(said, Advertisement)]
    assert len(set(keys)) == len(keys) == 10


def test_too_few_miss_the_quorum_and_change_nothing() -> None:
    dropped = {(name, 1): 2 for name in SIX[:4]}
    one = Federation(words("rounds=1"), dropped=dropped)
    with pytest.raises(QuorumNotReached, match="round 1"):
        one.play()
    assert one.store.missed_rounds == [1]
    assert not one.store.rounds
    assert not [said for said in one.said if isinstance(said, Revealed)]


def test_the_quorum_is_the_least_that_is_summed() -> None:
    dropped = {("amber", 1): 2, ("fern", 1): 2}
    with pytest.raises(QuorumNotReached):
        Federation(words("rounds=1", "clients.quorum=5"), dropped=dropped).play()


def test_a_sum_that_may_have_been_shown_is_asked_for_again_over_the_same_clients_only() -> None:
    # Two of six give no last shares: four did, and five were needed. The four are asked for no sum without the two.
    one = Federation(words("rounds=1"), dropped={("amber", 1): 4, ("fern", 1): 4})
    with pytest.raises(QuorumNotReached, match=r"just amber, birch.* as their sum may have been shown"):
        one.play()
    assert one.store.shown == {1: SIX}
    assert one.store.missed_rounds == [1]
    assert len({told.context.nonce for _, told in one.told if hasattr(told, "context")}) == 1


class Forgetful(Store):
    """A coordinator that says nothing of a sum that it was shown."""


def test_clients_themselves_refuse_a_second_sum_over_others() -> None:
    one = Federation(words("rounds=1"), dropped={("amber", 1): 4, ("fern", 1): 4})
    with pytest.raises(QuorumNotReached):
        one.play(Forgetful())
    openings = [told.context for _, told in one.told if hasattr(told, "context")]
    assert {len(context.names) for context in openings} == {6, 4}
    vectors = [said for said in one.said if isinstance(said, Masked)]
    assert len(vectors) == 6  # of the first attempt alone


def test_garbage_in_a_vector_changes_nothing() -> None:
    rng = np.random.default_rng(0)

    def change(name: str, message: Any) -> Any:
        if name == "dune" and isinstance(message, Masked):
            return Masked(name, rng.integers(0, 2**32, message.values.size, dtype=np.uint32))
        return message

    one = Federation(words("rounds=1"), change=change)
    with pytest.raises(QuorumNotReached):
        one.play()
    assert not one.store.rounds


def test_a_participants_fault_is_a_counted_rejection() -> None:
    def change(name: str, message: Any) -> Any:
        return Masked(name, message.values[:-1]) if name == "dune" and isinstance(message, Masked) else message

    one = Federation(words("rounds=1"), change=change)
    one.play()
    record = one.store.rounds[0].record
    assert record["rejections"] == [{"client_id": "dune", "reason": "schema"}]
    # It may still be needed: a coordinator that is started again asks it, too.
    assert [one.final for one in one.store.rejected] == [False]
    assert record["clients"] == [name for name in SIX if name != "dune"]


def test_who_was_at_fault_is_left_out_of_the_next_attempt() -> None:
    # Two of six send what is no vector; five were needed. The next attempt is among the other four.
    def change(name: str, message: Any) -> Any:
        return Masked(name, message.values[:-1]) if name in SIX[:2] and isinstance(message, Masked) else message

    one = Federation(words("rounds=1"), change=change)
    one.play()
    assert one.store.rounds[0].record["clients"] == list(SIX[2:])
    assert len({told.context.nonce for _, told in one.told if hasattr(told, "context")}) == 2


def test_the_record_says_nothing_of_one_client() -> None:
    one = Federation(words())
    one.play()
    for done in one.store.rounds:
        assert done.record["train_loss"] is None
        assert done.record["seconds_train"] == 0
        assert done.record["relative_error"] < 1e-6
        assert list(done.weights.values()) == [1.0]
        assert "num_examples" not in json.dumps(dict(done.record))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["strategy=recompress"], "Set strategy to one of ffa, alternate, core"),
        (["strategy=stack"], "Set strategy to one of ffa, alternate, core"),
        (["strategy=fedavg", "clients.ranks=4"], "Set strategy to one of ffa, alternate, core"),
        (["clients.fraction=0.3"], "at least 3"),
        (["clients.carry_rounds=1"], r"clients\.carry_rounds=1"),
        (["clients.over_selection=0.5"], "in no sum"),
        (["keep_updates=true"], "keep_updates=true"),
        (["aggregation.weights=contributors"], "num_examples or uniform"),
        (["aggregation.max_norm=1"], r"privacy\.secagg_range bounds"),
        (["privacy.secagg_range=0"], r"privacy\.secagg_range=0"),
    ],
)
def test_what_needs_single_updates_is_refused(more: list[str], said: str) -> None:
    from lamina.protos.config import checked

    with pytest.raises(ConfigError, match=said):
        checked(config_of(words(*more)))


def test_two_clients_are_refused() -> None:
    from lamina.protos.config import checked

    with pytest.raises(ConfigError, match="subtracting its own"):
        checked(config_of(words(names=SIX[:2])))


def test_weights_need_a_public_bound() -> None:
    with pytest.raises(ConfigError, match=r"aggregation\.weights=uniform"):
        _ = Federation(words("aggregation.full_weight=null")).campaign
