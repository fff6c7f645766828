"""A site's policy: the file, the terms that it allows, and what leaves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from lamina.client.policy import (
    Leave,
    Policy,
    PrivacyFloor,
    check_instruction,
    check_terms,
    check_upload,
    leaving,
    read,
)
from lamina.client.terms import DICTATED, leaf_types
from lamina.protos.config import known_keys
from lamina.protos.errors import ConfigError, PolicyRefused

EXAMPLE = Path(__file__).parents[2] / "deploy" / "policy.yaml"
WEIGHTS = "ab" * 32


def terms(task: Mapping[str, Any] | None = None, **changed: Any) -> dict[str, Any]:
    """Terms that the default policy allows, changed."""
    given: dict[str, Any] = {
        "protocol": 1,
        "run_id": "3f2a5c6b7d8e",
        "client_id": "clinic-a",
        "consortium": "lungs",
        "rank": 8,
        "rounds": 20,
        "hashes": {"weights": WEIGHTS, "config": "cd" * 32},
        "strategy": "recompress",
        "released_view": "aggregate",
        "budget": {"train": {"q_proj": 8}, "download": {"q_proj": 8}, "scale": {"q_proj": 2.0}, "held_version": -1},
        "spec": ["ef" * 32, 900],
        "heartbeat_s": 10.0,
        "chunk_bytes": 1024**2,
        "task": {"task": "causal-lm", "train.local_steps": 20, "privacy.mode": "none", **(task or {})},
    }
    return given | changed


def written(tmp_path: Path, text: str) -> Policy:
    (tmp_path / "policy.yaml").write_text(text)
    return read(tmp_path / "policy.yaml")


# --- the file


def test_the_shipped_file_names_every_key_with_its_default() -> None:
    assert read(EXAMPLE) == Policy()
    document = yaml.safe_load(EXAMPLE.read_text())
    assert set(document) == set(Policy.__dataclass_fields__) - {"source"}
    assert set(document["privacy"]) == set(PrivacyFloor.__dataclass_fields__)
    assert set(document["leave"]) == set(Leave.__dataclass_fields__)


def test_no_file_and_an_empty_file_are_the_default(tmp_path: Path) -> None:
    assert read(None) == Policy() == written(tmp_path, "") == written(tmp_path, "# nothing\n")


def test_a_file_sets_what_it_names(tmp_path: Path) -> None:
    text = f"""
coordinators: [hub]
consortium: lungs
base_hashes: [{WEIGHTS.upper()}]
tasks: [causal-lm]
strategies: [recompress]
raw_updates_to_peers: false
max_rounds: 3
max_bytes_up: 0
privacy: {{mode_at_least: example-dp, max_epsilon: 8, max_delta: 1e-5}}
leave: {{metrics: [], num_examples: hidden, evaluation: false}}
"""
    assert written(tmp_path, text) == Policy(
        coordinators=("hub",),
        consortium="lungs",
        base_hashes=(WEIGHTS,),
        tasks=("causal-lm",),
        strategies=("recompress",),
        raw_updates_to_peers=False,
        max_rounds=3,
        max_bytes_up=0,
        privacy=PrivacyFloor("example-dp", max_epsilon=8, max_delta=1e-5),
        leave=Leave((), "hidden", False),
    )


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("max_round: 3", "max_round: no such key. Did you mean max_rounds?"),
        ("privacy: {epsilon: 3}", "privacy.epsilon: no such key. Did you mean max_epsilon?"),
        ("source: elsewhere", "source: no such key"),
        ("max_rounds: 3\nmax_rounds: 300", "duplicate key max_rounds"),
        ("max_rounds: many", "max_rounds: expected a whole number >= 1, got 'many'"),
        ("max_rounds:", "max_rounds: expected a whole number >= 1, got nothing"),
        ("max_rank: true", "max_rank: expected a whole number"),
        ("max_rank: 0", "max_rank: expected a whole number"),
        ("raw_updates_to_peers: 'no'", "raw_updates_to_peers: expected true or false"),
        ("coordinators: hub", "coordinators: expected a list of names, got 'hub'"),
        ("base_hashes: [abc]", "base_hashes: expected a list of SHA-256 hashes"),
        ("tasks: [causal]", "tasks: expected a list of names among causal-lm"),
        ("privacy: example-dp", "privacy: expected keys below it"),
        (
            "privacy: {mode_at_least: dp}",
            "privacy.mode_at_least: expected one of none, client-dp, example-dp, got 'dp'",
        ),
        ("privacy: {max_epsilon: 0}", "privacy.max_epsilon: expected a number > 0"),
        ("privacy: {max_epsilon: .nan}", "privacy.max_epsilon: expected a number > 0"),
        ("privacy: {max_epsilon: .inf}", "privacy.max_epsilon: expected a number > 0"),
        ("leave: {num_examples: no}", "leave.num_examples: expected one of exact, rounded, hidden"),
        ("leave: {rank: hidden}", "leave.rank: expected one of exact"),
        ("[a, b]", "expected `key: value` lines"),
        ("coordinators: [", "expected YAML"),
        ("coordinators: !!python/object/apply:os.getcwd []", "expected YAML"),
    ],
)
def test_a_file_that_cannot_be_meant_is_refused(tmp_path: Path, text: str, named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        written(tmp_path, text)
    assert named in str(caught.value)
    assert "policy.yaml" in str(caught.value)


def test_a_named_file_that_is_missing_opens_nothing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"polcy\.yaml"):
        read(tmp_path / "polcy.yaml")


# --- the terms


def test_the_default_allows_an_ordinary_run() -> None:
    check_terms(Policy(), terms(), "hub")
    check_terms(Policy(), terms(consortium="", strategy="stack", released_view="all_raw"), None)


REFUSED: dict[str, tuple[Policy, dict[str, Any]]] = {
    "consortium": (Policy(consortium="hearts"), terms()),
    "base_hashes": (Policy(base_hashes=("00" * 32,)), terms()),
    "tasks": (Policy(tasks=("sequence-classification",)), terms()),
    "strategies": (Policy(strategies=("residual",)), terms()),
    "raw_updates_to_peers": (Policy(raw_updates_to_peers=False), terms(released_view="all_raw")),
    "max_rounds": (Policy(max_rounds=19), terms()),
    "max_rank": (Policy(max_rank=7), terms()),
    "max_local_steps": (Policy(max_local_steps=19), terms()),
    "max_batch_tokens": (
        Policy(max_batch_tokens=8 * 127),
        terms({"train.batch_size": 8, "train.max_length": 128, "evaluate.batch_size": 1}),
    ),
    "min_clients": (Policy(min_clients=3), terms(cohort_at_least=2)),
    "privacy.mode_at_least": (Policy(privacy=PrivacyFloor("example-dp")), terms({"privacy.mode": "client-dp"})),
    "privacy.unit_at_least": (
        Policy(privacy=PrivacyFloor(unit_at_least="user")),
        terms({"privacy.mode": "example-dp", "privacy.unit": "record", "privacy.epsilon": 8.0}),
    ),
    "privacy.total_epsilon": (
        Policy(privacy=PrivacyFloor(total_epsilon=8, total_delta=1e-5)),
        terms({"privacy.mode": "client-dp", "privacy.epsilon": 1.0}),
    ),
    "privacy.max_epsilon": (
        Policy(privacy=PrivacyFloor(max_epsilon=8)),
        terms({"privacy.mode": "example-dp", "privacy.epsilon": 8.5}),
    ),
    "privacy.max_delta": (
        Policy(privacy=PrivacyFloor(max_delta=1e-5)),
        terms({"privacy.mode": "client-dp", "privacy.delta": 1e-4}),
    ),
    "privacy.secagg": (Policy(privacy=PrivacyFloor(secagg=True)), terms({"privacy.secagg": False})),
}


@pytest.mark.parametrize("key", list(REFUSED))
def test_terms_beyond_the_policy_are_refused_by_the_name_of_its_key(key: str) -> None:
    policy, offered = REFUSED[key]
    with pytest.raises(PolicyRefused) as caught:
        check_terms(replace(policy, source="site.yaml"), offered, "hub")
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"site.yaml: {key}: expected ")
    assert "Ask the coordinator" in line
    assert caught.value.exit_code == 5


ALLOWED: list[tuple[Policy, dict[str, Any]]] = [
    (Policy(consortium="lungs", base_hashes=(WEIGHTS,), tasks=("causal-lm",), strategies=("recompress",)), terms()),
    (Policy(max_batch_tokens=32 * 128), terms()),
    (Policy(max_rounds=20, max_rank=8, max_local_steps=20, raw_updates_to_peers=False), terms()),
    (Policy(min_clients=3), terms(cohort_at_least=3)),
    (Policy(privacy=PrivacyFloor(secagg=True)), terms({"privacy.secagg": True})),
    (Policy(privacy=PrivacyFloor("client-dp")), terms({"privacy.mode": "example-dp", "privacy.epsilon": 8.0})),
    # What all runs cost is counted in the ledger, whatever one run says.
    (
        Policy(privacy=PrivacyFloor(total_epsilon=1, total_delta=1e-5)),
        terms({"privacy.mode": "example-dp", "privacy.epsilon": 8.0}),
    ),
    (Policy(privacy=PrivacyFloor(unit_at_least="user")), terms({"privacy.mode": "client-dp"})),
    (
        Policy(privacy=PrivacyFloor("example-dp", "user", 8, 1e-5)),
        terms({"privacy.mode": "example-dp", "privacy.unit": "user", "privacy.epsilon": 8, "privacy.delta": 1e-5}),
    ),
]


@pytest.mark.parametrize("number", range(len(ALLOWED)))
def test_terms_at_the_limit_are_allowed(number: int) -> None:
    check_terms(*ALLOWED[number], "hub")


@pytest.mark.parametrize("policy", [Policy(), Policy(privacy=PrivacyFloor("example-dp"))])
def test_private_terms_without_a_budget_are_refused_whatever_the_policy(policy: Policy) -> None:
    for task in ({}, {"privacy.epsilon": None}, {"privacy.noise_multiplier": 1e-3}):
        with pytest.raises(PolicyRefused, match=r"privacy\.epsilon: expected the budget of the run"):
            check_terms(policy, terms({"privacy.mode": "example-dp", **task}), "hub")


@pytest.mark.parametrize("more", ["", ", total_delta: 1.5", ", max_delta: 1"])
def test_a_total_without_its_delta_is_no_policy(tmp_path: Path, more: str) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text(f"privacy: {{total_epsilon: 8{more}}}")
    with pytest.raises(ConfigError, match=r"privacy\.total_epsilon: expected privacy\.total_delta"):
        read(path)
    path.write_text("privacy: {total_epsilon: 8, max_delta: 1e-5}")
    assert read(path).privacy == PrivacyFloor(total_epsilon=8, max_delta=1e-5)


def test_only_listed_coordinators() -> None:
    policy = Policy(coordinators=("hub", "hub-2"))
    check_terms(policy, terms(), "hub-2")
    for name in ("hub-3", None):
        with pytest.raises(PolicyRefused, match="coordinators: expected one of hub, hub-2"):
            check_terms(policy, terms(), name)


def test_everything_that_is_wrong_is_said_at_once() -> None:
    with pytest.raises(PolicyRefused) as caught:
        check_terms(Policy(max_rounds=1, max_rank=1, strategies=("residual",)), terms(), "hub")
    assert [line.split(": ")[1] for line in str(caught.value).splitlines()] == ["strategies", "max_rounds", "max_rank"]


@pytest.mark.parametrize(
    "setting",
    ["data.source", "data.text_column", "data.holdout", "model.source", "client.state", "output", "train.device"],
)
def test_a_coordinator_cannot_point_at_the_sites_own_things(setting: str) -> None:
    with pytest.raises(PolicyRefused, match="This setting is the site's own"):
        check_terms(Policy(), terms({setting: "/etc/passwd"}), "hub")


def test_what_a_coordinator_may_set_is_known_and_typed() -> None:
    assert list(leaf_types()) == list(known_keys())
    for one in DICTATED:
        assert any(key == one or key.startswith(one) for key in known_keys()), one
    check_terms(
        Policy(), terms({"privacy.epsilon": None, "train.learning_rate": 1, "lora.target_modules": ["q"]}), "hub"
    )
    with pytest.raises(PolicyRefused, match=r"train\.lerning_rate.*Did you mean train\.learning_rate\?"):
        check_terms(Policy(), terms({"train.lerning_rate": 1}), "hub")
    for key, value in {"train.learning_rate": "1", "train.local_steps": 2.0, "seed": True, "data.labels": [1]}.items():
        with pytest.raises(PolicyRefused, match=f"terms.task: {key}: expected a value of type"):
            check_terms(Policy(), terms({key: value}), "hub")


# --- instructions, uploads and what leaves


def test_instructions_within_the_policy() -> None:
    policy = Policy(max_rounds=5, max_bytes_down=100)
    check_instruction(policy, "train", 5, 100, 4)
    check_instruction(policy, "train", 5, 100, 2)
    check_instruction(policy, "evaluate", 5, 100, 5)
    check_instruction(policy, "evaluate", 0, 0, 3)
    for kind, number, num_bytes, last, named in [
        ("train", 6, 1, 0, "max_rounds: expected at most 5 rounds"),
        ("train", 5, 1, 5, "instruction.round: expected one after 5"),
        ("train", 2, 1, 5, "instruction.round: expected one after 5"),
        ("evaluate", 6, 1, 0, "max_rounds"),
        ("train", 1, 101, 0, "max_bytes_down: expected a release of at most 100 bytes, got 101"),
        ("train", 0, 1, 0, "instruction.round"),
        ("train", True, 1, 0, "instruction.round"),
        ("evaluate", -1, 1, 0, "instruction.round"),
        ("train", 1, -1, 0, "instruction.num_bytes"),
        ("run", 1, 1, 0, "instruction.kind: expected train or evaluate, got 'run'"),
    ]:
        with pytest.raises(PolicyRefused, match=named):
            check_instruction(policy, kind, number, num_bytes, last)
    with pytest.raises(PolicyRefused, match=r"leave\.evaluation"):
        check_instruction(Policy(leave=Leave(evaluation=False)), "evaluate", 1, 1, 0)


def test_an_update_that_is_too_large_stays() -> None:
    check_upload(Policy(max_bytes_up=10), 10)
    with pytest.raises(PolicyRefused, match="max_bytes_up"):
        check_upload(Policy(max_bytes_up=10), 11)


@pytest.mark.parametrize(
    ("count", "rounded"),
    [(1, 1), (9, 9), (14, 10), (15, 20), (25, 30), (94, 90), (95, 100), (1499, 1000), (8500, 9000)],
)
def test_numbers_of_examples_leave_as_the_policy_says(count: int, rounded: int) -> None:
    metrics = {"train_loss": 1.5, "tokens": 30.0, "longest_row": 900.0}
    assert leaving(Policy(), metrics, count) == ({"train_loss": 1.5, "tokens": 30.0}, count)
    assert leaving(Policy(leave=Leave(("tokens",), "rounded")), metrics, count) == ({"tokens": 30.0}, rounded)
    assert leaving(Policy(leave=Leave((), "hidden")), metrics, count) == ({}, 1)
