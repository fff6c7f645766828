"""What one unit more or less moves: never more than the clipping norm, and far more once a usual mistake is planted."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina.client.data import Example
from lamina.client.loading import BaseOptions, load_base
from lamina.client.losses import IGNORED, Batch
from lamina.client.model import Base, trainable_parameters
from lamina.client.private import train as private_train
from lamina.client.private.sampling import Share
from lamina.client.private.train import Private, clipped_sum, train_privately
from lamina.protos.adapter import Adapter
from lamina.protos.errors import ConfigError
from lamina.protos.privacy.mechanism import LEAST_CLIP, Mechanism
from lamina.protos.privacy.noise import seeded
from tests.models import save_llama
from tests.private import alone, filled, norm, rows, share, task, watched

pytestmark = pytest.mark.filterwarnings("ignore")
CLIP, SLACK = 0.05, 1 + 1e-5
POISON = 7


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return load_base(BaseOptions(str(save_llama(tmp_path_factory.mktemp("llama"))), device="cpu"))


@pytest.fixture(scope="module")
def poisoned(base: Base) -> Base:
    """One token of it has an embedding that is not a number; the output head is another matrix."""
    made = copy.deepcopy(base)
    model = made.model.get_base_model()
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone(), requires_grad=False)
    model.get_input_embeddings().weight.data[POISON] = math.nan
    return made


def total(base: Base, shares: Sequence[Share], clip: float = CLIP, micro: int = 64) -> torch.Tensor:
    """The clipped sum in one vector, float64."""
    parameters = filled(base)
    with watched(base, parameters) as sheet:
        found, _ = clipped_sum(base, sheet, shares, task(micro_batch=micro), clip)
    return torch.cat(found).double()


def moved(base: Base, shares: Sequence[Share], without: int, micro: int = 64, clip: float = CLIP) -> float:
    """How far the sum moves when a unit goes, in clipping norms."""
    rest = [one for number, one in enumerate(shares) if number != without]
    return float((total(base, shares, clip, micro) - total(base, rest, clip, micro)).norm()) / clip


def units(lengths: Sequence[Sequence[int]], base: Base, seed: int = 0) -> list[Share]:
    """One unit with an example of each length for each list."""
    made = iter(rows(base, [length for some in lengths for length in some], seed))
    return [share(*(next(made) for _ in some)) for some in lengths]


LENGTHS = st.lists(st.sampled_from([0, 2, 3, 8, 40]), min_size=1, max_size=3)


@settings(max_examples=12)
@given(
    lengths=st.lists(LENGTHS, min_size=1, max_size=6), micro=st.integers(1, 7), seed=st.integers(0, 99), data=st.data()
)
def test_a_unit_moves_the_sum_by_no_more_than_the_clipping_norm(
    base: Base, lengths: list[list[int]], micro: int, seed: int, data: st.DataObject
) -> None:
    shares = units(lengths, base, seed)
    gone = data.draw(st.integers(0, len(shares) - 1))
    assert moved(base, shares, gone, micro) <= SLACK


def test_one_long_row_among_short_ones(base: Base) -> None:
    shares = units([[60], *[[2]] * 30], base)
    assert 0.99 <= moved(base, shares, 0) <= SLACK


def test_a_row_that_gives_no_number_gives_nothing(poisoned: Base) -> None:
    shares = units([[9], [4], [12]], poisoned)
    poison = Example(np.array([5, POISON, 9, 9], np.int32), np.arange(4) > 0, row=9)
    clean = total(poisoned, shares)
    for micro in (1, 2, 64):
        found = total(poisoned, [shares[0], share(poison), *shares[1:]], micro=micro)
        assert float((found - clean).norm()) <= 1e-6 * float(clean.norm())
    user = share(poison, *shares[0].examples)
    assert not total(poisoned, [user], micro=1).any()


def test_gradients_too_small_for_a_norm_in_float32_are_no_way_around_the_bound(base: Base) -> None:
    """A coordinator that makes A and B tiny makes the gradients tiny; their squares vanish, and nothing is clipped. Below the
    least clipping norm that moved the sum by a million of them; such a bound is refused.
    """
    parameters, one = filled(base), units([[9]], base)
    for size in (1e-12, 1e-20, 1e-24):
        for parameter in parameters.values():
            parameter.data.fill_(size)
        with watched(base, parameters) as sheet:
            found, _ = clipped_sum(base, sheet, one, task(), LEAST_CLIP)
        assert float(torch.cat(found).double().norm()) <= LEAST_CLIP * SLACK
    for too_small in (LEAST_CLIP / 2, 1e-30, 5e-324):
        mechanism = Mechanism("record", 1.0, 8.0, 1.0, too_small, 1, 1, 0.0, 1e-5)
        private = Private(mechanism, 8, lambda *names: seeded(0, *names))
        with pytest.raises(ConfigError, match=r"train\.max_grad_norm >= 1e-06"):
            train_privately(base, [*one[0].examples], task(local_steps=1), private, Adapter())


def test_norms_are_at_most_the_clipping_norm_and_small_gradients_stay(base: Base) -> None:
    parameters, shares = filled(base), units([[9], [0], [3, 12]], base)
    for one in shares:
        own = norm(alone(base, parameters, one))
        for clip in (0.5 * own, 2 * own) if own else (1.0,):
            assert float(total(base, [one], clip).norm()) == pytest.approx(min(own, clip), rel=1e-5)
            assert float(total(base, [one], clip).norm()) <= clip * SLACK


def test_without_a_bound_it_is_the_sum_of_all_gradients(base: Base) -> None:
    parameters, shares = filled(base), units([[9], [2, 30], [0], [5]], base)
    wanted = sum(
        torch.cat([one.flatten() for one in alone(base, parameters, each).values()]).double() for each in shares
    )
    found = total(base, shares, clip=1e9)
    assert float((found - wanted).norm()) <= 1e-5 * float(torch.as_tensor(wanted).norm())


@given(lengths=st.lists(LENGTHS, min_size=1, max_size=5))
@settings(max_examples=6)
def test_micro_batches_change_nothing(base: Base, lengths: list[list[int]]) -> None:
    """Also where the rows of one unit lie in two or more of them."""
    shares = units(lengths, base)
    whole = total(base, shares)
    for micro in (1, 2, 3, 5):
        assert float((total(base, shares, micro=micro) - whole).norm()) <= 1e-5 * max(float(whole.norm()), 1e-9)


def test_an_empty_step_looks_at_no_model(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(*_: Any, **__: Any) -> Any:
        raise AssertionError("the model was asked")

    parameters = filled(base)
    with watched(base, parameters) as sheet:
        monkeypatch.setattr(base.model, "forward", forward)
        found, loss = clipped_sum(base, sheet, [], task(), CLIP)
    assert [one.shape for one in found] == [(parameter.numel(),) for parameter in parameters.values()]
    assert not torch.cat(found).any()
    assert math.isnan(loss)


def test_planted_a_mean_over_the_tokens_of_the_batch(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `model(labels=...).loss` has it: a long row shrinks the gradients of all others, and its absence lets them grow. Here by
    24 clipping norms, with 1 long and 63 short rows that agree.
    """

    def mean_of_the_batch(base: Base, batch: Batch) -> tuple[torch.Tensor, int, int]:
        labels = torch.where(batch.mask.bool(), batch.targets, IGNORED)
        loss = base.model(input_ids=batch.tokens, attention_mask=batch.mask, labels=labels, use_cache=False).loss
        return loss * len(batch.tokens), 0, 0

    shares = [*units([[60], [2]], base), *units([[60], [2]], base)[1:] * 63]
    clip = 4.0
    assert moved(base, shares, 0, clip=clip) <= SLACK
    monkeypatch.setattr(private_train, "losses", mean_of_the_batch)
    assert moved(base, shares, 0, clip=clip) > 10


def test_planted_users_that_are_clipped_row_by_row(base: Base) -> None:
    """Three rows of one user as three units move the sum by more than one unit may."""
    user = units([[9, 9, 9]], base)[0]
    others = units([[5], [12]], base, seed=1)
    apart = [share(one) for one in user.examples]
    together = float((total(base, [user, *others]) - total(base, others)).norm())
    assert together <= CLIP * SLACK
    assert float((total(base, [*apart, *others]) - total(base, others)).norm()) > 1.2 * CLIP


def test_planted_a_denominator_that_depends_on_the_data(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the optimizer sees moves by at most clipping norm / expected units; divided by who came it moves by far more."""
    expected, examples = 8.0, rows(base, [9, 0, 0])
    mechanism = Mechanism("record", 1.0, expected, 1.0, CLIP, 1, 1, 0.0, 1e-5)
    monkeypatch.setattr(private_train, "noised", lambda total, deviation, stream: total.astype(np.float64))
    monkeypatch.setattr(private_train, "optimizer_of", lambda config, parameters: torch.optim.SGD(parameters, lr=1.0))

    def after(examples: Sequence[Example]) -> torch.Tensor:
        filled(base)
        private = Private(mechanism, 8, lambda *names: seeded(0, *names))
        plain = task(schedule="constant", learning_rate=1.0, local_steps=1)
        train_privately(base, examples, plain, private, Adapter())
        return torch.cat([one.detach().flatten() for one in trainable_parameters(base).values()]).double()

    assert float((after(examples) - after(examples[:2])).norm()) <= 1e-6
    assert float((after(examples) - after(examples[1:])).norm()) <= CLIP / expected * (1 + 1e-3)
    right = private_train.clipped_sum

    def by_who_came(base: Base, sheet: Any, shares: Sequence[Share], *rest: Any) -> Any:
        found, loss = right(base, sheet, shares, *rest)
        return [one * expected / len(shares) for one in found], loss

    monkeypatch.setattr(private_train, "clipped_sum", by_who_came)
    assert float((after(examples) - after(examples[:1])).norm()) > 2 * CLIP / expected
