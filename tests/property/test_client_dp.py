"""client-dp at the coordinator: what one client can move, what does not depend on the data, and what each round costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamina.protos.adapter import Adapter, LoraFactors
from lamina.protos.errors import AdapterMismatch, ConfigError
from lamina.protos.messages import Trainable, Update
from lamina.protos.privacy.events import Event, from_json
from lamina.protos.privacy.noise import seeded
from lamina.protos.sides import numbers_of, with_numbers
from lamina.strategies import Options, build, central
from lamina.strategies.base import ServerState, Strategy
from lamina.strategies.central import Central, clipping, private
from tests.federation import MODULES, spec
from tests.property.oracles import UNUSED, Federation, Matrix, federations, sides, strategy_of
from tests.property.test_linear import Round, campaign_of, rounds_of

NAMES = ("ffa", "alternate", "core")
# So little noise that what is seen is the sum before it; float32 storage is coarser.
SILENT = 1e-9


def mechanism(
    clip_norm: float = 1.0, noise: float = SILENT, denominator: float = 3.0, full: int | None = None
) -> Central:
    return Central(clip_norm, noise, 1.0, denominator, full)


def over(name: str, federation: Federation, of: Central, seed: int = 0) -> Strategy:
    return private(strategy_of(name, federation), of, lambda number: seeded(seed, "noise", number))


def last(name: str, federation: Federation, rounds: int) -> Round:
    """The round whose updates are looked at, after others that moved both factors."""
    return list(rounds_of(campaign_of(name, federation), federation, [federation.members] * rounds))[-1]


def moved(before: ServerState, after: ServerState, side: str) -> Matrix:
    """All coordinates of a state's change, in one vector."""
    pairs = [(getattr(f, side), getattr(before.adapter.lora[m], side)) for m, f in sorted(after.adapter.lora.items())]
    pairs += [(value, before.adapter.dense[name]) for name, value in sorted(after.adapter.dense.items())]
    return np.concatenate([(new.astype(np.float64) - old).ravel() for new, old in pairs])


def stepped(strategy: Strategy, played: Round, updates: Sequence[Update]) -> Matrix:
    after = strategy.step(played.before, updates, played.releases, UNUSED)
    return moved(played.before, after, side_of(played))


def side_of(played: Round) -> Trainable:
    return next(iter(played.releases.values())).train


def rounding(played: Round) -> float:
    """Of the stored factors: they are float32, whatever is added."""
    state = played.before.adapter
    values = [sum(np.abs(one).max(initial=0) for one in sides(f).values()) for f in state.lora.values()]
    size = sum(one.size for f in state.lora.values() for one in sides(f).values())
    size += sum(v.size for v in state.dense.values())
    values += [np.abs(value).max() for value in state.dense.values()]
    return 2 * float(max(values)) * math.sqrt(size) * 2.0**-24


def times(update: Update, start: Adapter, factor: float, side: Trainable) -> Update:
    """The update with its change multiplied."""
    lora = {}
    for module, f in update.adapter.lora.items():
        old = numbers_of(start.lora[module], side)
        lora[module] = with_numbers(f, side, old + factor * (numbers_of(f, side) - old))
    dense = {
        name: start.dense[name] + factor * (value - start.dense[name]) for name, value in update.adapter.dense.items()
    }
    return replace(update, adapter=Adapter(lora, dense))


# Sensitivity -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@given(
    data=st.data(),
    federation=federations(least=2),
    clip_norm=st.sampled_from([0.01, 1.0, 7.0]),
    full=st.sampled_from([None, 1, 500]),
    rounds=st.integers(1, 2),
)
def test_one_client_moves_the_mean_by_no_more_than_clip_over_denominator(
    name: str, data: st.DataObject, federation: Federation, clip_norm: float, full: int | None, rounds: int
) -> None:
    played = last(name, federation, rounds)
    side = side_of(played)
    huge = data.draw(st.sampled_from([1e-6, 1.0, 1e6]))
    first = times(played.updates[0], played.releases[played.updates[0].client_id].trainable, huge, side)
    with_it = [first, *played.updates[1:]]
    strategy = over(name, federation, mechanism(clip_norm, full=full))
    change = stepped(strategy, played, with_it) - stepped(strategy, played, with_it[1:])
    assert np.linalg.norm(change) <= clip_norm / 3.0 * (1 + 1e-6) + rounding(played)


@pytest.mark.parametrize("name", NAMES)
@given(federation=federations(least=3))
def test_the_denominator_is_fixed_whoever_answers_and_however_much_data_they_have(
    name: str, federation: Federation
) -> None:
    """What a client adds is the same beside few and beside many, and whatever number of examples it claims."""
    played = last(name, federation, 1)
    strategy = over(name, federation, mechanism())
    whole = stepped(strategy, played, played.updates)
    parts = [stepped(strategy, played, [replace(one, num_examples=10**6)]) for one in played.updates]
    assert np.linalg.norm(whole - sum(parts)) <= (1 + len(parts)) * rounding(played) + 1e-6


@given(federation=federations(least=3))
def test_a_denominator_that_depends_on_the_clients_is_seen_by_the_law_above(federation: Federation) -> None:
    """The mistake, planted: the mean over whoever answered. One client more then moves what the others had added."""
    played = last("ffa", federation, 1)
    few, all_of = played.updates[:1], played.updates
    by_answers = [
        stepped(over("ffa", federation, mechanism(denominator=float(len(some)))), played, some)
        for some in (few, all_of)
    ]
    fixed = [stepped(over("ffa", federation, mechanism()), played, some) for some in (few, all_of)]
    others = stepped(over("ffa", federation, mechanism()), played, all_of[1:])
    slack = 3 * rounding(played) + 1e-6
    assert np.linalg.norm(fixed[1] - fixed[0] - others) <= slack
    assert np.linalg.norm(by_answers[1] - by_answers[0] - others) > slack


@given(federation=federations(least=2), weight=st.integers(0, 3000))
def test_weights_are_capped(federation: Federation, weight: int) -> None:
    played = last("ffa", federation, 1)
    one = replace(played.updates[0], num_examples=weight)
    strategy = over("ffa", federation, mechanism(full=1000))
    full = stepped(over("ffa", federation, mechanism()), played, [one])
    assert np.linalg.norm(stepped(strategy, played, [one]) - min(1.0, weight / 1000) * full) <= 4 * rounding(played)


@given(federation=federations(), bad=st.sampled_from([math.nan, math.inf, -math.inf, 1e300]))
def test_what_is_not_finite_counts_as_nothing(federation: Federation, bad: float) -> None:
    """Admission refuses such updates before; the mechanism does not rely on it."""
    played = last("ffa", federation, 1)
    dense = {name: np.full(value.shape, bad) for name, value in played.updates[0].adapter.dense.items()}
    broken = replace(played.updates[0], adapter=Adapter(played.updates[0].adapter.lora, dense))
    strategy = over("ffa", federation, mechanism())
    change = stepped(strategy, played, [broken]) - stepped(strategy, played, [])
    assert np.isfinite(change).all()
    assert np.linalg.norm(change) <= 1 / 3 + rounding(played)


def test_clipping_is_of_the_norm_over_all_coordinates() -> None:
    change = {"a": np.full((2, 2), 3.0), "b": np.full(4, 4.0)}  # norms 6 and 8: 10 in all
    assert clipping(change, 5.0) == pytest.approx(0.5)
    assert clipping(change, 10.0) == 1.0
    assert clipping({"a": np.zeros(3)}, 1.0) == 1.0


# Noise and cost ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@given(federation=federations(least=2, modules=["q_proj", "down_proj"], everywhere=True))
def test_noise_is_in_every_coordinate_and_of_the_size_that_is_accounted(name: str, federation: Federation) -> None:
    """Standard deviation z C / W, also in slots and layers that nobody's change reaches; 4 sigma of the sample's own error."""
    played = last(name, federation, 2)
    of = mechanism(clip_norm=0.5, noise=2.0, denominator=4.0)
    draws = [stepped(over(name, federation, of, seed), played, []) for seed in range(8)]
    values = np.concatenate(draws)
    assert (np.abs(values) > 0).mean() > 0.99
    assert np.std(values) == pytest.approx(0.25, rel=4 / math.sqrt(2 * values.size))
    assert abs(np.corrcoef(draws[0], draws[1])[0, 1]) < 5 / math.sqrt(draws[0].size)


@given(federation=federations())
def test_noise_differs_from_round_to_round(federation: Federation) -> None:
    of = mechanism(noise=1.0)
    strategy = over("ffa", federation, of)
    first = strategy.step(strategy.init(federation.spec), [], {}, UNUSED)
    second = strategy.step(first, [], {}, UNUSED)
    one, two = moved(strategy.init(federation.spec), first, "B"), moved(first, second, "B")
    assert abs(np.corrcoef(one, two)[0, 1]) < 6 / math.sqrt(one.size)


@pytest.mark.parametrize("name", NAMES)
@given(federation=federations())
def test_every_round_is_an_event_also_one_that_nobody_answered(name: str, federation: Federation) -> None:
    of = Central(0.5, 1.5, 0.25, 2.0)
    strategy = over(name, federation, of)
    state = strategy.init(federation.spec)
    for number in range(1, 4):
        state = strategy.step(state, [], {}, UNUSED)
        events = [from_json(event, "history") for event in state.privacy_history]
        assert events == [Event("", n, 1.5, 0.25, 1, 0.5, "client") for n in range(1, number + 1)]
    assert state.round == 3


@pytest.mark.parametrize("name", ["recompress", "residual", "stack", "zeropad"])
def test_only_what_needs_sums_alone_can_be_private(name: str) -> None:
    inner = build(name, Options(dict.fromkeys(MODULES, 2), dict.fromkeys(MODULES, 2.0)))
    with pytest.raises(ConfigError, match=r"strategy=ffa"):
        private(inner, mechanism(), lambda number: seeded(0)).init(spec())


def test_changes_are_in_global_slots_and_at_the_global_scale() -> None:
    """By hand: a client of rank 1 at scale 6 beside global factors of rank 2 at scale 2 moves B by 3 in its one slot."""
    current = Adapter({"m": LoraFactors(np.zeros((2, 3)), np.zeros((4, 2)), 2.0)}, {})
    start = Adapter({"m": LoraFactors(np.zeros((1, 3)), np.zeros((4, 1)), 6.0)}, {})
    trained = Adapter({"m": LoraFactors(np.ones((1, 3)), np.ones((4, 1)), 6.0)}, {})
    assert np.array_equal(central.change(current, trained, start, "B")["m"], np.full((4, 1), 3.0))
    assert np.array_equal(central.change(current, trained, start, "A")["m"], np.ones((1, 3)))


def test_a_core_is_clipped_and_noised_and_nothing_else() -> None:
    """By hand, as above: the core of a client of rank 1 moves by 3 in its one slot, and the frozen factors stay as they are."""
    rows, columns = np.ones((2, 3), np.float32), np.ones((4, 2), np.float32)
    current = Adapter({"m": LoraFactors(rows, columns, 2.0, np.zeros((2, 2), np.float32))}, {})
    start = Adapter({"m": LoraFactors(rows[:1], columns[:, :1], 6.0, np.zeros((1, 1)))}, {})
    trained = Adapter({"m": LoraFactors(rows[:1], columns[:, :1], 6.0, np.ones((1, 1)))}, {})
    assert np.array_equal(central.change(current, trained, start, "core")["m"], np.full((1, 1), 3.0))
    assert central.nothing(current, "core")["m"].shape == (2, 2)
    with pytest.raises(AdapterMismatch, match="lora_core"):
        central.nothing(Adapter({"m": LoraFactors(rows, columns)}, {}), "core")
