"""Laws of the secure sum, privacy.md section 8.3, item 10: exact for every pattern of dropouts, and no single vector shows."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina.protos.errors import SecureSumAborted, SecureSumRefused, TrainingError
from lamina.protos.secagg import client, masks, server, shamir
from lamina.protos.secagg.context import default_threshold
from lamina.protos.secagg.encoding import decode, encode, encoding
from lamina.protos.secagg.messages import Agreed, Masked, Revealed, Survivors
from tests.masking import STAGES, attempt, drawn, summed


@settings(max_examples=40, deadline=None)
@given(st.integers(3, 7), st.data())
def test_the_sum_is_exact_for_every_pattern_of_dropouts_or_nothing_is_known(
    participants: int, data: st.DataObject
) -> None:
    least = max(3, participants // 2 + 1)
    threshold = data.draw(st.integers(least, participants))
    one = attempt(participants, threshold, length=5, signed=data.draw(st.booleans()), seed=participants)
    dropped = data.draw(st.dictionaries(st.sampled_from(one.context.names), st.sampled_from(STAGES)))
    left = [name for name in one.context.names if dropped.get(name) not in ("keys", "shares", "vector")]
    if participants - len(dropped) < threshold:
        with pytest.raises(SecureSumAborted, match="nothing is known"):
            one.run(dropped)
        return
    total, survivors = one.run(dropped)
    assert list(survivors) == left
    assert (total == summed(one, left)).all()


@pytest.mark.parametrize("stage", STAGES)
def test_every_subset_of_two_of_six_may_drop_out_at_any_stage(stage: str) -> None:
    for pair in itertools.combinations(range(6), 2):
        one = attempt(6, 4, length=3)
        dropped = {one.context.names[index]: stage for index in pair}
        total, survivors = one.run(dropped)
        assert (total == summed(one, survivors)).all()
        assert len(survivors) == (6 if stage in ("signature", "reveal") else 4)


def test_a_masked_vector_is_uniform_whatever_is_in_it() -> None:
    # Chi-square with 255 degrees of freedom: mean 255, deviation 22.6; the bytes drawn here are fixed, so this is no lottery.
    one = attempt(4, length=50_000)
    one = replace(one, vectors={name: np.zeros(50_000, np.uint32) for name in one.context.names})
    one.run()
    vectors = [message.values for message in one.sent if isinstance(message, Masked)]
    for values in vectors:
        counts = np.bincount(values.view(np.uint8), minlength=256)
        assert abs(((counts - 200_000 / 256) ** 2 / (200_000 / 256)).sum() - 255) < 5 * 22.6
    for first, second in itertools.combinations(vectors, 2):
        assert np.abs(np.corrcoef(first.astype(float), second.astype(float))[0, 1]) < 5 / np.sqrt(50_000)


def test_the_masks_of_all_but_one_leave_the_last_uniform() -> None:
    # What the coordinator has when it was refused the last shares: three seeds of four say nothing of the fourth vector.
    one = attempt(4, length=20_000)
    one = replace(one, vectors={name: np.zeros(20_000, np.uint32) for name in one.context.names})
    one.run()
    vectors = {message.name: message.values for message in one.sent if isinstance(message, Masked)}
    rest = np.stack(list(vectors.values())).sum(axis=0, dtype=np.uint32)
    for name in one.context.names[:3]:
        begun = client.begin(one.context, one.me(name), one.vectors[name])[0]
        masks.add_stream(rest, masks.self_key(begun.seed, one.context.digest, name), -1)
    counts = np.bincount(rest.view(np.uint8), minlength=256)
    assert abs(((counts - 80_000 / 256) ** 2 / (80_000 / 256)).sum() - 255) < 5 * 22.6


def test_fresh_keys_in_each_attempt() -> None:
    first, second = attempt(4, seed=1), attempt(4, seed=2)
    second = replace(second, vectors=first.vectors)
    first.run(), second.run()
    sent = [[m.values for m in one.sent if isinstance(m, Masked)] for one in (first, second)]
    assert all((a != b).mean() > 0.9 for a, b in zip(*sent))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 12), st.data())
def test_any_threshold_of_shares_gives_the_secret_and_one_fewer_another(holders: int, data: st.DataObject) -> None:
    threshold = data.draw(st.integers(1, holders))
    secret = data.draw(st.binary(min_size=32, max_size=32))
    shares = shamir.split(secret, holders, threshold, drawn(secret.hex()))
    chosen = data.draw(st.permutations(range(holders)))[:threshold]
    assert shamir.combined({holder: shares[holder] for holder in chosen}) == secret
    if threshold > 1:
        with pytest.raises(SecureSumAborted):  # 2**256 of 2**521 elements are secrets: chance finds none
            shamir.combined({holder: shares[holder] for holder in chosen[1:]})


def test_shares_of_a_known_polynomial() -> None:
    # f(x) = 5 + 7 x: the draw gives 7 in the top 521 of 528 bits.
    shares = shamir.split((5).to_bytes(32, "big"), 3, 2, lambda size: (7 << 7).to_bytes(size, "big"))
    assert [int.from_bytes(share, "big") for share in shares] == [12, 19, 26]


@settings(max_examples=50, deadline=None)
@given(st.integers(3, 64), st.floats(1e-3, 1e3), st.integers(0, 2**31))
def test_encoded_sums_are_off_by_half_a_step_each_at_most(count: int, bound: float, seed: int) -> None:
    grid = encoding(bound, count)
    values = np.random.default_rng(seed).uniform(-bound, bound, (count, 20))
    values[:, 0], values[:, 1] = bound, -bound
    total = np.zeros(20, np.uint32)
    for row in values:
        total += encode(row, grid)
    assert count * grid.levels <= 2**28
    error = np.abs(decode(total, count, grid) - values.sum(axis=0))
    assert error.max() <= count * grid.step / 2 * (1 + 1e-9)
    assert error[:2].max() <= 1e-9 * count * bound  # the ends are numbers of the grid


@pytest.mark.parametrize("bad", [1.0001, -1.0001, np.nan, np.inf])
def test_a_number_out_of_range_is_refused_and_not_clipped(bad: float) -> None:
    with pytest.raises(TrainingError, match="secagg_range"):
        encode(np.array([0.0, bad]), encoding(1.0, 3))


def test_a_vector_of_garbage_is_noticed() -> None:
    one = attempt(4, length=64)
    grid = encoding(1.0, 4)
    honest = {name: encode(np.zeros(64), grid) for name in one.context.names}
    assert np.abs(decode(replace(one, vectors=honest).run()[0], 4, grid)).max() == 0
    garbage = np.random.default_rng(0).integers(0, 2**32, 64, dtype=np.uint32)
    total, survivors = replace(one, vectors={**honest, "site1": garbage}, sent=[], states={}).run()
    with pytest.raises(SecureSumAborted, match="no such sum"):
        decode(total, len(survivors), grid)


@pytest.mark.parametrize("participants", [1, 2])
def test_fewer_than_three_are_refused_and_told_why(participants: int) -> None:
    with pytest.raises(SecureSumRefused, match="subtracting its own"):
        attempt(participants, 2)


@pytest.mark.parametrize(("participants", "threshold"), [(3, 2), (4, 2), (10, 5), (4, 5)])
def test_a_threshold_that_lets_two_sums_be_had_is_refused(participants: int, threshold: int) -> None:
    with pytest.raises(SecureSumRefused, match="threshold"):
        attempt(participants, threshold)


@given(st.integers(3, 10_000))
def test_the_default_threshold_is_above_two_thirds_and_allowed(participants: int) -> None:
    threshold = default_threshold(participants)
    assert 2 * participants / 3 < threshold <= participants
    assert threshold <= 2 * participants / 3 + 1


def test_a_stream_is_the_same_in_parts_and_is_undone() -> None:
    key = bytes(range(32))
    whole = np.zeros(3 * 2**17 + 5, np.uint32)
    masks.add_stream(whole, key, 1)
    part = np.zeros(2**17 + 1, np.uint32)
    masks.add_stream(part, key, 1)
    assert (whole[: part.size] == part).all()
    masks.add_stream(whole, key, -1)
    assert not whole.any()


def test_no_message_holds_two_kinds_of_share_of_one_participant() -> None:
    one = attempt(6, 4)
    one.run({"site0": "vector", "site1": "signature"})
    for message in one.sent:
        if isinstance(message, Revealed):
            assert not message.seeds.keys() & message.keys.keys()
            assert set(message.keys) == {"site0"}


def test_what_a_state_shows_of_itself_is_no_secret() -> None:
    one = attempt(4)
    begun, _ = client.begin(one.context, one.me("site1"), one.vectors["site1"])
    for secret in (begun.seed, begun.mask.private, begun.share.private):
        assert repr(secret)[2:-1] not in repr(begun)


def test_a_state_has_one_way_forward() -> None:
    one = attempt(4)
    begun, _ = client.begin(one.context, one.me("site1"), one.vectors["site1"])
    for message in (Survivors(one.context.names), Agreed({})):
        with pytest.raises(SecureSumRefused, match="taken once"):
            client.advance(begun, message)
    with pytest.raises(SecureSumRefused, match="taken once"):
        client.advance(client.Finished(), Survivors(one.context.names))
    assert server.waited_for(server.begin(one.context, 3)) == set(one.context.names)
