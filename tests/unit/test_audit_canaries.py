"""Canaries: what they are made of, whose they are, and coins that nothing else decides."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lamina.audits import canaries
from lamina.audits.settings import Settings, campaign_words, quick, taken
from lamina.client.data import Example
from lamina.client.loading import BaseOptions, load_base
from lamina.client.model import Base
from lamina.protos.errors import ConfigError


@pytest.fixture(scope="module")
def base(llama: Path) -> Base:
    return load_base(BaseOptions(source=str(llama)))


@pytest.fixture(scope="module")
def classifier(bert: Path) -> Base:
    options = BaseOptions(source=str(bert), task="sequence-classification", labels=("a", "b", "c"))
    return load_base(options)


def rows(count: int, tokens: int = 6) -> list[Example]:
    return [
        Example(np.full(tokens, 5 + number % 3, np.int32), np.arange(tokens) > 0, row=number) for number in range(count)
    ]


def test_rare_canaries_are_uniform_tokens_that_are_no_special_ones(base: Base) -> None:
    found = canaries.rare(base, 400, ["0", "1", "2"], 64, 0)
    tokens = np.stack([one.tokens for one in found.examples])
    assert tokens.shape == (400, 16)
    assert not set(base.tokenizer.all_special_ids) & set(tokens.ravel().tolist())
    counts = np.bincount(tokens.ravel(), minlength=base.vocab)
    # 6400 draws of 1022 tokens: 6.3 each; none is as frequent as in text.
    assert counts.max() < 25
    assert all(one.targets[1:].all() and not one.targets[0] for one in found.examples)
    assert len({one.tokens.tobytes() for one in found.examples}) == 400


def test_coins_are_fair_and_of_each_canary_alone(base: Base) -> None:
    """Whose it is, what it says and how many there are decide nothing."""
    found = canaries.rare(base, 400, ["0", "1"], 64, 3)
    assert 160 < found.included.sum() < 240  # four deviations
    by_client = [found.included[[one == client for one in found.clients]] for client in ("0", "1")]
    assert abs(by_client[0].mean() - by_client[1].mean()) < 0.2
    assert (found.included == canaries.rare(base, 400, ["a", "b", "c"], 8, 3).included).all()
    assert (found.included != canaries.rare(base, 400, ["0", "1"], 64, 4).included).any()


def test_a_client_has_what_its_coins_say(base: Base) -> None:
    train = {"0": rows(5), "1": rows(7)}
    found = (canaries.rare(base, 20, ["0", "1"], 64, 0), canaries.new_token(base, train, 6, 64, 0))
    made = canaries.inserted(train, found)
    assert train == {"0": train["0"], "1": train["1"]}
    for client, few in train.items():
        inside = sum(
            bool(coin)
            for some in found
            for coin, owner in zip(some.included, some.clients, strict=True)
            if owner == client
        )
        assert len(made[client]) == len(few) + inside
        assert canaries.dealt_to(client, found) == 13
        new = made[client][len(few) :]
        assert len({one.row for one in made[client]}) == len(few) + inside
        assert all(one.row > max(row.row for row in few) and one.user.startswith("canary-") for one in new)


def test_new_tokens_are_ones_that_the_data_hardly_have(base: Base) -> None:
    train = {"0": rows(9), "1": rows(9)}
    found = canaries.new_token(base, train, 50, 64, 0)
    last = [int(one.tokens[-1]) for one in found.examples]
    assert len(set(last)) == 50
    assert not {5, 6, 7} & set(last)
    assert all(one.targets.sum() == 1 and one.targets[-1] for one in found.examples)


def test_a_classifiers_canaries_have_labels_of_their_own(classifier: Base) -> None:
    found = canaries.rare(classifier, 60, ["0"], 12, 0)
    assert {one.label for one in found.examples} == {0, 1, 2}
    assert all(len(one.tokens) <= 12 for one in found.examples)
    assert canaries.new_token(classifier, {"0": rows(3)}, 5, 12, 0).examples == ()


def test_references_are_other_sequences(base: Base) -> None:
    one = {example.tokens.tobytes() for example in canaries.rare(base, 50, ["0"], 64, 0).examples}
    other = {example.tokens.tobytes() for example in canaries.references(base, 50, 64, 0)}
    assert len(other) == 50
    assert not one & other


def test_words_become_settings_and_the_rest_is_left() -> None:
    words = ["--quick", "outputs/run", "guesses=40", "privacy=none", "parts=canaries,membership", "rounds=2"]
    found = taken(words)
    assert words == ["privacy=none", "rounds=2"]
    assert (found.run_dir, found.guesses, found.canaries) == (Path("outputs/run"), 40, 120)
    assert found.parts == ("canaries", "membership")
    assert campaign_words(found, ["rounds", "clients.count"])
    assert not any(
        word.startswith(("rounds=", "clients.count=")) for word in campaign_words(found, ["rounds", "clients.count"])
    )


def test_quick_is_smaller_and_otherwise_the_same() -> None:
    whole, small = Settings(significance=0.01), quick(Settings(significance=0.01))
    assert (small.canaries, small.guesses, small.shadows) < (whole.canaries, whole.guesses, whole.shadows)
    assert small.significance == whole.significance
    with pytest.raises(ConfigError, match="Did you mean canaries"):
        taken(["canaris=3"])
