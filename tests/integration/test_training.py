"""Local training and evaluation: what a loss is a mean of, and what the proximal term measures."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lamina.client import train as module
from lamina.client.data import Example
from lamina.client.evaluate import score
from lamina.client.loading import BaseOptions, load_base
from lamina.client.model import Base, put, take, trainable_parameters
from lamina.client.train import Task, completed, learning_rate, train
from lamina.protos.adapter import Adapter, LoraFactors, product
from lamina.protos.config import TrainConfig
from lamina.protos.errors import TrainingError
from lamina.simulations import engine
from lamina.simulations.prepare import prepare
from tests.runs import play, small


@pytest.fixture(scope="module")
def base(llama: Path) -> Base:
    return load_base(BaseOptions(str(llama), device="cpu"))


def uneven(count: int = 8) -> list[Example]:
    """Examples with 1 to 8 targets each, so that a mean of means is not the mean."""
    rng = np.random.default_rng(0)
    made = []
    for number in range(count):
        tokens = rng.integers(2, 1000, 10).astype(np.int32)
        made.append(Example(tokens, np.arange(10) >= 9 - number % 8))
    return made


def started(base: Base, rank: int = 2) -> Adapter:
    rng = np.random.default_rng(1)
    lora = {
        name: LoraFactors(
            rng.normal(size=(rank, d_in)).astype(np.float32) * 0.3,
            rng.normal(size=(d_out, rank)).astype(np.float32) * 0.3,
            2.0,
        )
        for name, (d_out, d_in) in base.spec.modules.items()
    }
    return Adapter(lora)


def settings(**more: Any) -> TrainConfig:
    return TrainConfig(**{"local_steps": 1, "max_grad_norm": 0.0, "schedule": "constant", "learning_rate": 0.1, **more})


def plain_descent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps that are the gradient itself, which AdamW's are not."""

    def made(parameters: Any, lr: float, weight_decay: float) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=lr)

    monkeypatch.setattr(torch.optim, "AdamW", made)


def stepped(base: Base, config: TrainConfig, examples: list[Example]) -> tuple[Adapter, dict[str, float]]:
    start = started(base)
    put(base, start, None)
    metrics, _ = train(base, examples, Task("0", 1, 1, 0, config), start)
    return take(base), metrics


def test_accumulated_batches_give_the_gradient_of_one(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    plain_descent(monkeypatch)
    one, figures = stepped(base, settings(batch_size=8), uneven())
    two, other = stepped(base, settings(batch_size=4, accumulation=2), uneven())
    four, _ = stepped(base, settings(batch_size=2, accumulation=4), uneven())
    start = started(base)
    for name, factors in one.lora.items():
        moved = np.abs(factors.B - start.lora[name].B).max()
        assert moved > 1e-5
        for same in (two, four):
            assert np.abs(factors.A - same.lora[name].A).max() < 1e-5 * max(1.0, moved)
            assert np.abs(factors.B - same.lora[name].B).max() < 1e-5 * max(1.0, moved)
    assert figures["train_loss"] == pytest.approx(other["train_loss"], rel=1e-6)
    assert figures["tokens"] == other["tokens"] == sum(int(example.targets.sum()) for example in uneven())


@pytest.mark.parametrize("micro", [1, 2, 4])
def test_a_batch_in_pieces_gives_the_gradient_of_the_whole(
    base: Base, monkeypatch: pytest.MonkeyPatch, micro: int
) -> None:
    plain_descent(monkeypatch)
    whole, figures = stepped(base, settings(batch_size=4, accumulation=2), uneven())
    pieces, other = stepped(base, settings(batch_size=4, accumulation=2, micro_batch=micro), uneven())
    assert other["train_loss"] == pytest.approx(figures["train_loss"], rel=1e-6)
    assert other["tokens"] == figures["tokens"]
    for name, factors in whole.lora.items():
        np.testing.assert_allclose(pieces.lora[name].A, factors.A, rtol=0, atol=2e-6)
        np.testing.assert_allclose(pieces.lora[name].B, factors.B, rtol=0, atol=2e-6)


def test_activations_that_are_computed_again_are_the_same(base: Base) -> None:
    kept, figures = stepped(base, settings(local_steps=2, checkpointing=False), uneven())
    again, other = stepped(base, settings(local_steps=2, checkpointing=True), uneven())
    assert base.model.get_base_model().is_gradient_checkpointing
    stepped(base, settings(checkpointing=False), uneven())
    assert not base.model.get_base_model().is_gradient_checkpointing
    assert other["train_loss"] == figures["train_loss"]
    for name, factors in kept.lora.items():
        np.testing.assert_array_equal(again.lora[name].A, factors.A)
        np.testing.assert_array_equal(again.lora[name].B, factors.B)


def test_moments_in_8_bits_descend_as_others_do(base: Base) -> None:
    pytest.importorskip("bitsandbytes")
    config = settings(local_steps=12, batch_size=8, learning_rate=5e-3)
    _, plain = stepped(base, config, uneven())
    _, short = stepped(base, replace(config, optimizer="adamw8bit"), uneven())
    _, still = stepped(base, replace(config, learning_rate=1e-9), uneven())
    assert short["train_loss"] < still["train_loss"] - 0.5 * (still["train_loss"] - plain["train_loss"])


def test_the_training_loss_is_a_mean_over_tokens(base: Base) -> None:
    put(base, started(base), None)
    nats = [score(base, [example], 1) for example in uneven()]
    wanted = sum(one.nats for one in nats) / sum(one.targets for one in nats)
    means = float(np.mean([one.loss for one in nats]))
    _, metrics = stepped(base, settings(batch_size=8, learning_rate=0.0), uneven())
    assert metrics["train_loss"] == pytest.approx(wanted, rel=1e-5)
    assert abs(means - wanted) > 1e-3


def test_the_loss_is_that_of_transformers(base: Base) -> None:
    put(base, started(base), None)
    example = Example(np.arange(5, 17, dtype=np.int32), np.arange(12) > 0)
    ids = torch.arange(5, 17)[None]
    with torch.no_grad():
        wanted = float(base.model(input_ids=ids, labels=ids).loss)
    assert score(base, [example], 1).loss == pytest.approx(wanted, rel=1e-5)


def test_padding_and_batch_size_change_no_loss(base: Base) -> None:
    put(base, started(base), None)
    rng = np.random.default_rng(3)
    lengths = [3, 17, 9, 5, 12]
    examples = [Example(rng.integers(2, 1000, n).astype(np.int32), np.arange(n) > 0) for n in lengths]
    one, other = score(base, examples, 1), score(base, examples, 5)
    assert one.nats == pytest.approx(other.nats, rel=1e-5)
    assert (one.targets, one.hits) == (other.targets, other.hits) == (sum(lengths) - 5, one.hits)


def test_the_evaluation_weighs_clients_by_their_tokens(llama: Path, notes: Path) -> None:
    config = small(llama, notes, "evaluate.max_examples=null")
    prepared = prepare(config)
    lengths = {"0": 1, "1": 2, "2": 3}
    held = {client: list(prepared.held_out[client][:1]) * lengths[client] ** 3 for client in prepared.held_out}
    figures = engine.evaluate(replace(prepared, held_out=held), Adapter(), config, "base")
    tokens = {client: one["tokens"] for client, one in figures.per_client.items()}
    wanted = sum(one["loss"] * one["tokens"] for one in figures.per_client.values()) / sum(tokens.values())
    assert figures.loss == pytest.approx(wanted, rel=1e-9)
    assert abs(figures.loss - np.mean([one["loss"] for one in figures.per_client.values()])) > 1e-4
    assert figures.accuracy is None


GAUGES: dict[str, Callable[[LoraFactors], LoraFactors]] = {
    "rescaled": lambda f: LoraFactors(f.A / 10, f.B * 10, f.scale),
    "at another scale": lambda f: LoraFactors(f.A * 2, f.B, f.scale / 2),
    "negated": lambda f: LoraFactors(-f.A, -f.B, f.scale),
    "permuted": lambda f: LoraFactors(f.A[::-1].copy(), f.B[:, ::-1].copy(), f.scale),
}


def proximal(base: Base, here: Adapter, there: Adapter) -> float:
    put(base, here, None)
    return float(module.proximal_term(base, module.anchored(there, base)).detach())


def test_the_proximal_term_is_the_distance_of_products(base: Base) -> None:
    rng = np.random.default_rng(5)
    here = started(base, 3)
    there = Adapter(
        {
            name: LoraFactors(f.A + rng.normal(size=f.A.shape).astype(np.float32) * 0.2, f.B, f.scale)
            for name, f in here.lora.items()
        }
    )
    wanted = sum(float(np.square(product(here.lora[m]) - product(there.lora[m])).sum()) for m in here.lora)
    assert proximal(base, here, there) == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("name", [name for name in GAUGES if name != "at another scale"])
def test_the_proximal_term_does_not_see_the_gauge(base: Base, name: str) -> None:
    here = started(base)
    there = Adapter({module: GAUGES[name](factors) for module, factors in here.lora.items()})
    size = sum(float(np.square(product(f)).sum()) for f in here.lora.values())
    assert abs(proximal(base, here, there)) < 1e-5 * size


def test_a_strong_proximal_term_stays_near_the_release(base: Base) -> None:
    def distance(mu: float) -> float:
        trained, _ = stepped(base, settings(local_steps=10, learning_rate=0.01, proximal=mu), uneven())
        start = started(base)
        return sum(float(np.square(product(trained.lora[m]) - product(start.lora[m])).sum()) for m in start.lora)

    assert distance(100.0) < 0.3 * distance(0.0)


def test_the_schedule_runs_over_the_campaign() -> None:
    config = settings(schedule="cosine", warmup_steps=4, final_learning_rate=0.1, learning_rate=1.0)
    rates = [learning_rate(config, step, 40) for step in range(40)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[:5] == sorted(rates[:5])
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert max(rates) == pytest.approx(1.0)
    # Loshchilov and Hutter 2017 (arXiv:1608.03983), eq. 5, at the midpoint: (final + peak) / 2.
    assert learning_rate(config, 22, 40) == pytest.approx(0.55)
    assert learning_rate(config, 40, 40) == pytest.approx(0.1)
    constant = settings(warmup_steps=1, learning_rate=1.0)
    assert [learning_rate(constant, step, 40) for step in (0, 1, 39)] == [0.5, 1.0, 1.0]


def test_a_loss_that_is_not_finite_names_client_round_and_step(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> tuple[torch.Tensor, torch.Tensor, int]:
        return torch.tensor(math.nan, requires_grad=True), torch.tensor(0), 1

    monkeypatch.setattr(module, "losses", broken)
    with pytest.raises(TrainingError, match="client 0, round 1, step 1") as caught:
        stepped(base, settings(), uneven())
    assert caught.value.exit_code == 2


def test_an_epoch_shows_every_example_once() -> None:
    examples = uneven(6)
    stream = module.batches(examples, 4, np.random.default_rng(0))
    seen = [id(example) for _ in range(6) for example in next(stream)]
    for epoch in range(4):
        assert sorted(seen[6 * epoch : 6 * epoch + 6]) == sorted(map(id, examples))


def test_only_the_slots_are_trained(base: Base) -> None:
    put(base, started(base), None)
    names = set(trainable_parameters(base))
    assert names == {f"{m}.lora_{side}" for m in base.spec.modules for side in "AB"}
    wanting = {name for name, value in base.model.named_parameters() if value.requires_grad}
    assert all("lora_" in name for name in wanting)


def test_kept_moments_are_used(llama: Path, notes: Path) -> None:
    words = ["strategy=zeropad", "train.schedule=constant"]
    kept, dropped = (
        play(small(llama, notes, *words, f"train.keep_optimizer={keep}")).state.adapter for keep in ("true", "false")
    )
    assert any(not np.array_equal(kept.lora[m].A, dropped.lora[m].A) for m in kept.lora)


def test_completed_fills_up_with_slots_that_add_nothing(base: Base) -> None:
    ranks = dict.fromkeys(base.spec.modules, 4)
    start = completed(Adapter(), ranks, dict.fromkeys(ranks, 2.0), Task("3", 1, 1, 0, settings()), base)
    for name, factors in start.lora.items():
        bound = 1 / math.sqrt(base.spec.modules[name][1])
        assert not factors.B.any()
        assert np.abs(factors.A).max() <= bound
        # Uniform in +-bound: variance bound^2 / 3, as peft's Kaiming-uniform with a = sqrt(5).
        assert factors.A.std() == pytest.approx(bound / math.sqrt(3), rel=0.35)


def test_adapters_of_one_shape_take_turns_in_one_piece_of_memory(base: Base) -> None:
    first, second = started(base, 3), started(base, 3)
    for factors in second.lora.values():
        factors.A[:] += 1.0
    put(base, first, None)
    places = {name: parameter.data_ptr() for name, parameter in trainable_parameters(base).items()}
    for parameter in trainable_parameters(base).values():
        parameter.grad = torch.ones_like(parameter)
    put(base, second, None)
    assert {name: parameter.data_ptr() for name, parameter in trainable_parameters(base).items()} == places
    assert all(parameter.grad is None for parameter in trainable_parameters(base).values())
    for name, factors in take(base).lora.items():
        np.testing.assert_array_equal(factors.A, second.lora[name].A)
    put(base, first, None, trainable=False)
    assert trainable_parameters(base) == {}
    put(base, started(base, 2), None)
    assert {factors.rank for factors in take(base).lora.values()} == {2}
