"""Command-line words and YAML to a config: shorthands, sweeps, paths, and errors that name the nearest key."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from lamina.__main__ import main
from lamina.protos import compose
from lamina.protos.config import SHORTHANDS, Config, known_keys, value_of
from lamina.protos.errors import ConfigError
from tests.runs import config_of


@pytest.mark.parametrize(
    ("shorthand", "key", "value"),
    [
        ("data", "data.source", "notes.jsonl"),
        ("model", "model.source", "some/model"),
        ("strategy", "strategy.name", "stack"),
        ("partition", "partition.kind", "iid"),
        ("privacy", "privacy.mode", "none"),
        ("quantisation", "quantisation.format", "fp32"),
    ],
)
def test_a_shorthand_is_its_canonical_key(shorthand: str, key: str, value: str) -> None:
    assert SHORTHANDS[shorthand] == key
    assert value_of(config_of(f"{shorthand}={value}"), key) == value


@pytest.mark.parametrize(
    "words",
    list(
        itertools.permutations(["data=a.jsonl", "data.text_column=body", "partition=shards", "partition.column=site"])
    ),
)
def test_shorthands_and_sub_keys_go_in_any_order(words: tuple[str, ...]) -> None:
    made = config_of(*words)
    assert (made.data.source, made.data.text_column) == ("a.jsonl", "body")
    assert (made.partition.kind, made.partition.column) == ("shards", "site")


@pytest.mark.parametrize(
    "path",
    [
        "/data/my notes.jsonl",
        "/data/a=b/c.jsonl",
        "/data/notes (1).jsonl",
        "/data/it's.jsonl",
        "/data/[x]{y},z.jsonl",
        "/data/100%.jsonl",
        "~/notes.jsonl",
        "/data/né.jsonl",
        "C:\\data\\notes.jsonl",
        "/data/back\\slash's.jsonl",
        "/data/trailing\\",
        "/data/a#b:c.jsonl",
        "'quoted path.jsonl'",
        "/data/$HOME.jsonl",
    ],
)
@pytest.mark.parametrize("key", ["data", "model.source", "output"])
def test_paths_are_taken_as_typed(key: str, path: str) -> None:
    made = config_of(f"{key}={path}")
    wanted = path.strip("'") if path.startswith("'") else path
    assert value_of(made, SHORTHANDS.get(key, key)) == wanted


def test_values_keep_their_types() -> None:
    made = config_of(
        "clients.ranks=[4,2,1]", "clients.count=3", "baselines=[base,local]", "lora.lora_alpha=16", "keep_updates=true"
    )
    assert made.clients.ranks == [4, 2, 1]
    assert made.baselines == ["base", "local"]
    assert made.lora.lora_alpha == 16.0
    assert made.keep_updates is True


@pytest.mark.parametrize(
    "word",
    [
        "lora.rank_pattern={q_proj:0}",
        "lora.rank_pattern.q_proj=0",
        "+lora.rank_pattern.q_proj=0",
    ],
)
def test_a_rank_pattern_can_be_given_as_a_word(word: str) -> None:
    assert config_of(word).lora.rank_pattern == {"q_proj": 0}


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("train.learning_rat=0.1", "train.learning_rate"),
        ("stratgy=stack", "strategy"),
        ("clients.rank=8", "clients.ranks"),
        ("learning_rate=0.1", "train.learning_rate"),
        ("roundz=3", "rounds"),
        ("+new.key=1", "no such key"),
        ("hydra.run.dir=x", "no such key"),
        ("data.surce=x", "data.source"),
    ],
)
def test_an_unknown_key_names_the_nearest(word: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=hint if hint == "." else hint.replace(".", r"\.")):
        config_of(word)


@pytest.mark.parametrize(
    "word",
    [
        "rounds",
        "rounds=many",
        "rounds=[1,2",
        "rounds=1.5",
        "keep_updates=perhaps",
        "=3",
        "train=3",
        "data.labels=card",
        "",
    ],
)
def test_a_malformed_word_is_a_config_error(word: str) -> None:
    with pytest.raises(ConfigError):
        config_of(word)


def test_a_value_of_another_type_names_its_key_alone() -> None:
    with pytest.raises(ConfigError, match=r"^privacy\.epsilon: Value 'abc'"):
        config_of("rounds=2", "privacy=example-dp", "privacy.epsilon=abc")


@pytest.mark.parametrize(
    "word",
    ["rounds=-1", "clients.ranks=[8,8]", "task=poetry", "seed=-1", "train.learning_rate=-1", "clients.fraction=0"],
)
def test_an_impossible_value_is_a_config_error(word: str) -> None:
    with pytest.raises(ConfigError):
        config_of(word)


def test_a_sweep_is_the_product_with_the_last_key_fastest() -> None:
    runs = compose.sweeps(["strategy=recompress,stack", "rounds=3", "seed=0,1"], True)
    wanted = [("recompress", 0), ("recompress", 1), ("stack", 0), ("stack", 1)]
    made = [compose.composed(overrides) for overrides in runs]
    assert [(config.strategy.name, config.seed) for config in made] == wanted
    assert {config.rounds for config in made} == {3}


def test_a_sweep_over_lists_and_paths() -> None:
    runs = compose.sweeps(["clients.count=2", "clients.ranks=[4,2],[8,8]", "data=a.jsonl,b.jsonl"], True)
    made = [compose.composed(overrides) for overrides in runs]
    assert [(config.clients.ranks, config.data.source) for config in made] == [
        ([4, 2], "a.jsonl"),
        ([4, 2], "b.jsonl"),
        ([8, 8], "a.jsonl"),
        ([8, 8], "b.jsonl"),
    ]


def test_several_values_without_multirun_are_refused() -> None:
    with pytest.raises(ConfigError, match="--multirun"):
        config_of("seed=0,1")


def test_yaml_lies_below_the_words(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("rounds: 7\ntrain:\n  batch_size: 3\nlora:\n  rank_pattern:\n    q_proj: 0\nclients:\n  ranks: 4\n")
    made = compose.composed(["rounds=2"], file)
    assert (made.rounds, made.train.batch_size, made.clients.ranks) == (2, 3, 4)
    assert made.lora.rank_pattern == {"q_proj": 0}


def test_a_resolved_config_reads_back_the_same(tmp_path: Path) -> None:
    first = config_of("data=/x y/z=1.jsonl", "strategy=residual", "clients.ranks=[1,2,3]", "clients.count=3", "seed=5")
    first.data.labels = ["b", "a"]
    file = tmp_path / "config.yaml"
    file.write_text(compose.to_yaml(first))
    again = compose.composed([], file)
    assert isinstance(again, Config)
    assert {key: value_of(again, key) for key in known_keys()} == {key: value_of(first, key) for key in known_keys()}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("rounds: [1\n", "YAML"),
        ("roundz: 3\n", "rounds"),
        ("train:\n  learning_rat: 3\n", "train.learning_rate"),
        ("rounds: many\n", "rounds"),
        ("- rounds\n- seed\n", "."),
        ("just words\n", "."),
        ("data: notes.jsonl\n", "."),
        ("1: 2\n", "."),
    ],
)
def test_a_bad_yaml_file_is_a_config_error(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=said if said == "." else said.replace(".", r"\.")):
        compose.composed([], file)


def test_a_missing_or_binary_yaml_file_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        compose.composed([], tmp_path / "none.yaml")
    with pytest.raises(ConfigError):
        compose.composed([], tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00rounds: 3")
    with pytest.raises(ConfigError):
        compose.composed([], tmp_path / "binary.yaml")


def test_help_shows_each_default_on_one_line_and_the_shorthands_of_its_keys() -> None:
    keys = ["data.template", "data.revision", "lora.rank", "keep_updates", "strategy.name", "data.labels"]
    shown = [line.strip() for line in compose.help_text("head", keys).splitlines()]
    wanted = {
        'data.template ("{prompt}\\n")',
        "data.revision (unset)",
        "lora.rank (unset)",
        "keep_updates (false)",
        "strategy.name (recompress)",
        "data.labels ([])",
    }
    assert wanted <= set(shown)
    assert shown[-1] == "shorthands: strategy="
    assert len(shown) == 1 + 2 * len(keys) + 2


@pytest.mark.parametrize(
    ("command", "shorthands"), [("coordinator", {"strategy", "privacy"}), ("client", {"data", "model", "quantisation"})]
)
def test_a_commands_help_lists_what_it_reads_and_nothing_else(
    command: str, shorthands: set[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, "--help"]) == 0
    out = capsys.readouterr().out
    assert {word.rstrip("=") for word in out.splitlines()[-1].split()[1:]} == shorthands
    assert "clients.dropout_rate" not in out
    assert "all keys" not in out


def test_a_resolved_config_of_some_keys_names_no_other() -> None:
    text = compose.to_yaml(config_of("clients.ranks=[1,2]", "clients.count=2", "seed=5"), ["clients.ranks", "seed"])
    assert text == "clients:\n  ranks:\n  - 1\n  - 2\nseed: 5\n"


def test_an_empty_yaml_file_is_the_defaults(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("")
    assert compose.composed([], tmp_path / "empty.yaml").rounds == Config().rounds
