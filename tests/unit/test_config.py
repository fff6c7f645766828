"""What a config may hold: every choice and range, and values that are possible alone and not together."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from lamina.protos.config import Config, checked, known_keys, per_client, value_of
from lamina.protos.config import checks as module
from lamina.protos.errors import ConfigError


def with_value(key: str, value: Any) -> Config:
    made = Config()
    node: Any = made
    *path, leaf = key.split(".")
    for part in path:
        node = getattr(node, part)
    setattr(node, leaf, value)
    return made


def test_the_defaults_are_possible() -> None:
    made = Config()
    assert checked(made) is made


@pytest.mark.parametrize("key", list(module._CHOICES))
def test_every_choice_is_checked_and_listed(key: str) -> None:
    choices = module._CHOICES[key]
    with pytest.raises(ConfigError) as caught:
        checked(with_value(key, choices[0] + "x"))
    message = str(caught.value)
    assert f"{key}={choices[0]}x" in message
    assert f"Did you mean {choices[0]}?" in message
    assert all(choice in message for choice in choices)


@pytest.mark.parametrize("key", ["task", "strategy.name", "partition.kind", "wire.format", "aggregation.weights"])
def test_every_listed_choice_is_accepted(key: str) -> None:
    for choice in module._CHOICES[key]:
        checked(with_value(key, choice))


@pytest.mark.parametrize("key", list(module._RANGES))
def test_every_range_is_checked(key: str) -> None:
    low, high, closed = module._RANGES[key]
    wrong = [low - 1, math.nan, *([] if closed else [low]), *([] if math.isinf(high) else [high + 1])]
    for value in wrong:
        with pytest.raises(ConfigError, match=key.replace(".", r"\.")):
            checked(with_value(key, value))


@pytest.mark.parametrize("key", list(module._RANGES))
def test_the_ends_of_a_range_that_are_allowed_pass(key: str) -> None:
    low, _, closed = module._RANGES[key]
    value = low if closed else low + 1e-3
    if key == "clients.count":
        checked(with_value(key, 1))
    elif key in ("privacy.epsilon", "privacy.noise_multiplier"):
        config = with_value(key, 1.0)
        checked(replace(config, privacy=replace(config.privacy, mode="example-dp")))
    elif isinstance(value_of(Config(), key), int) or value_of(Config(), key) is None:
        checked(with_value(key, int(value) if closed else 1.0))
    else:
        checked(with_value(key, value))


@pytest.mark.parametrize("key", ["privacy.epsilon", "privacy.noise_multiplier"])
def test_a_budget_without_a_mode_that_keeps_it_is_refused(key: str) -> None:
    with pytest.raises(ConfigError, match=rf"{key}=8: expected privacy.mode=example-dp or client-dp.*leave {key} out"):
        checked(with_value(key, 8.0))


@pytest.mark.parametrize(
    "key",
    [
        "partition.dirichlet_alpha",
        "train.learning_rate",
        "train.weight_decay",
        "train.proximal",
        "lora.lora_alpha",
        "aggregation.learning_rate",
    ],
)
def test_an_infinite_setting_is_impossible(key: str) -> None:
    with pytest.raises(ConfigError):
        checked(with_value(key, math.inf))


def test_all_wrong_keys_are_named_at_once() -> None:
    made = with_value("rounds", 0)
    made.task = "poetry"
    with pytest.raises(ConfigError) as caught:
        checked(made)
    assert "rounds=0" in str(caught.value)
    assert "task=poetry" in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("clients.ranks", [4, 2], "got 2 entries"),
        ("clients.ranks", 0, "integers >= 1"),
        ("clients.ranks", 2.5, "integers >= 1"),
        ("clients.ranks", True, "integers >= 1"),
        ("clients.ranks", "eight", "integers >= 1"),
        ("clients.ranks", [8] * 9 + [None], "for client 9"),
        ("clients.ranks", [], "got 0 entries"),
        ("clients.join_round", [1, 2], "clients.join_round"),
        ("clients.quorum", 11, "at most clients.count=10"),
        ("clients.dropout_rate", 1.0, "dropout_rate"),
        ("baselines", ["base", "oracle"], "oracle"),
        ("lora.rank_pattern", {"q_proj": -1}, "rank_pattern.q_proj"),
        ("lora.rank_pattern", {"q_proj": "2"}, "rank_pattern.q_proj"),
        ("lora.rank_pattern", [1], "mapping"),
        ("data.prompt_column", "q", "both or neither"),
        ("data.response_column", "a", "both or neither"),
        ("lora.use_rslora", True, "lora_alpha"),
        ("train.keep_optimizer", True, "keep_optimizer"),
        ("data.holdout", "0", "data.holdout"),
        ("data.holdout", "0.5", "data.holdout"),
        ("data.holdout", "-0.1", "data.holdout"),
        ("data.holdout", "nan", "data.holdout"),
    ],
)
def test_impossible_values_are_named(key: str, value: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said.replace("(", r"\(")):
        checked(with_value(key, value))


def test_fedavg_wants_one_rank_and_names_the_exact_strategy() -> None:
    made = with_value("clients.ranks", [8] * 9 + [4])
    made.strategy.name = "fedavg"
    with pytest.raises(ConfigError, match="strategy=recompress"):
        checked(made)
    made.clients.ranks = [8] * 10
    checked(made)


@pytest.mark.parametrize("strategy", ["fedavg", "zeropad", "ffa", "core"])
def test_optimizer_state_is_kept_where_coordinates_are_stable(strategy: str) -> None:
    made = with_value("train.keep_optimizer", True)
    made.strategy.name = strategy
    checked(made)


def test_what_changes_its_factor_keeps_no_moments_and_no_stragglers() -> None:
    made = with_value("train.keep_optimizer", True)
    made.strategy.name = "alternate"
    with pytest.raises(ConfigError, match="alternate trains another factor"):
        checked(made)
    made = with_value("clients.carry_rounds", 1)
    made.strategy.name = "alternate"
    with pytest.raises(ConfigError, match="strategy=ffa"):
        checked(made)
    made.strategy.name = "ffa"
    checked(made)


@pytest.mark.parametrize("strategy", ["ffa", "alternate", "core"])
def test_importance_is_for_strategies_that_train_both_factors(strategy: str) -> None:
    made = with_value("lora.allocation", "importance")
    made.strategy.name = strategy
    with pytest.raises(ConfigError, match="allocation=importance"):
        checked(made)


def test_messages_and_prompts_exclude_each_other() -> None:
    made = with_value("data.messages_column", "messages")
    made.data.prompt_column, made.data.response_column = "q", "a"
    with pytest.raises(ConfigError, match="one of them"):
        checked(made)


@pytest.mark.parametrize(("given", "wanted"), [(8, [8, 8, 8]), ([1, 2, 3], [1, 2, 3]), ((1, 2, 3), [1, 2, 3])])
def test_per_client_spreads_a_single_value(given: Any, wanted: list[int]) -> None:
    assert per_client(given, 3, "clients.ranks") == wanted


def test_every_key_has_a_line_of_help_and_a_value() -> None:
    keys = known_keys()
    assert {"data.source", "rounds", "clients.ranks", "aggregation.rank_cap", "output"} <= set(keys)
    for key, text in keys.items():
        assert text, key
        value_of(Config(), key)


def test_configs_do_not_share_their_lists() -> None:
    Config().baselines.append("base")
    assert Config().baselines == []
