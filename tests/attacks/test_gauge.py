"""Attack: rescale the factors, (10 B, A / 10). The product is the same, so an exact strategy is not moved; fedavg is."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from lamina.protos.adapter import Adapter, LoraFactors, product
from lamina.protos.codec import encode_update
from lamina.protos.messages import Update
from lamina.server.store.base import Completed
from tests.federation import MODULES, attacked, budget, campaign, one_round, reasons
from tests.runs import same_bits

GAUGE = 10.0


def rescaled(update: Update) -> Update:
    lora = {
        module: LoraFactors((f.A / GAUGE).astype(np.float32), (f.B * GAUGE).astype(np.float32), f.scale)
        for module, f in update.adapter.lora.items()
    }
    return Update(**{**vars(update), "adapter": Adapter(lora, update.adapter.dense)})


def rotated(update: Update) -> Update:
    lora = {}
    for module, f in update.adapter.lora.items():
        turn, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(f.rank, f.rank)))
        lora[module] = LoraFactors((turn.T @ f.A).astype(np.float32), (f.B @ turn).astype(np.float32), f.scale)
    return Update(**{**vars(update), "adapter": Adapter(lora, update.adapter.dense)})


def distance(one: Completed, other: Completed) -> float:
    """Largest relative Frobenius distance of the global products."""
    gaps = []
    for module in MODULES:
        first, second = product(one.state.adapter.lora[module]), product(other.state.adapter.lora[module])
        gaps.append(float(np.linalg.norm(first - second) / np.linalg.norm(second)))
    return max(gaps)


@pytest.mark.parametrize("gauge", [rescaled, rotated])
@pytest.mark.parametrize("strategy", ["recompress", "residual", "stack"])
def test_an_exact_strategy_is_not_moved(strategy: str, gauge: Callable[[Update], Update]) -> None:
    one = campaign(strategy)
    moved = attacked(one, lambda _, update: encode_update(gauge(update), "fp32"))
    assert reasons(moved) == []
    # float32 factors: one rounding of each entry, 2^-24, through sums of a few terms.
    assert distance(moved, one_round(one)) < 1e-6


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_nobody_can_tell_from_the_next_release(rank: int) -> None:
    one = campaign("recompress")
    moved = attacked(one, lambda _, update: encode_update(rescaled(update), "fp32"))
    first, second = (one.strategy.release(after.state, budget(rank)) for after in (moved, one_round(one)))
    for module in MODULES:
        wanted = product(second.trainable.lora[module])
        assert np.linalg.norm(product(first.trainable.lora[module]) - wanted) < 1e-5 * np.linalg.norm(wanted)


@pytest.mark.parametrize("strategy", ["fedavg", "zeropad"])
def test_factor_averaging_is_moved_and_reports_it(strategy: str) -> None:
    """Documented harm: (sum p B)(sum p A) depends on the gauge, here by more than a tenth of its size."""
    one = campaign(strategy, ranks=(3, 3, 3))
    plain, moved = one_round(one), attacked(one, lambda _, update: encode_update(rescaled(update), "fp32"))
    assert reasons(moved) == []
    assert distance(moved, plain) > 0.1
    assert moved.record["relative_error"] > 0.1


def test_the_dense_part_has_no_gauge() -> None:
    one = campaign("recompress")
    plain, moved = one_round(one), attacked(one, lambda _, update: encode_update(rescaled(update), "fp32"))
    assert same_bits(Adapter({}, plain.state.adapter.dense), Adapter({}, moved.state.adapter.dense))
