"""Attack: a coordinator whose terms and instructions are nonsense, huge, or made to slip through a site's policy."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamina.client.policy import Policy, PrivacyFloor, check_instruction, check_terms
from lamina.client.terms import leaf_types
from lamina.protos.errors import PolicyRefused
from tests.unit.test_policy import terms

STRICT = Policy(
    coordinators=("hub",),
    consortium="lungs",
    base_hashes=("ab" * 32,),
    tasks=("causal-lm",),
    strategies=("recompress",),
    raw_updates_to_peers=False,
    max_rounds=20,
    max_local_steps=40,
    max_rank=8,
    min_clients=3,
    privacy=PrivacyFloor("example-dp", "record", 8.0, 1e-5),
)
FAIR = {"privacy.mode": "example-dp", "privacy.epsilon": 4.0, "privacy.delta": 1e-6}

numbers = st.integers() | st.sampled_from([10**4000, -(10**400), 2**63]) | st.floats()
scalars = st.none() | st.booleans() | numbers | st.text(st.characters(), max_size=20) | st.binary(max_size=5)
nonsense = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(scalars, inner, max_size=3), max_leaves=8
)
keys = st.sampled_from([*terms(), "cohort_at_least", "budget", "spec", "heartbeat_s", "chunk_bytes"])
settings_keys = st.sampled_from(list(leaf_types())) | scalars


def budget(ranks: dict[str, int]) -> dict[str, Any]:
    return {"train": ranks, "download": ranks, "scale": dict.fromkeys(ranks, 2.0), "held_version": -1}


def passes(policy: Policy, offered: Any, name: Any = "hub") -> bool:
    """Whether the policy lets them through; any error but a refusal is a failure of the test."""
    try:
        check_terms(policy, offered, name)
    except PolicyRefused as refused:
        text = str(refused)
        assert text
        text.encode("utf-8")  # a lone surrogate would crash whoever logs it
        assert all(line.isprintable() for line in text.splitlines())
        return False
    return True


@given(nonsense)
def test_nonsense_for_terms_is_refused(offered: Any) -> None:
    assert not passes(Policy(), offered)


@given(st.dictionaries(keys, nonsense, max_size=4), st.dictionaries(settings_keys, nonsense, max_size=4))
def test_nonsense_in_terms_raises_only_refusals(changed: Any, task: Any) -> None:
    offered = terms({**FAIR, **task}, cohort_at_least=3) | changed
    passes(Policy(), offered)
    passes(STRICT, offered)


near = st.fixed_dictionaries(
    {},
    optional={
        "rounds": st.integers(0, 40),
        "rank": st.integers(0, 16),
        "cohort_at_least": st.integers(0, 6),
        "strategy": st.sampled_from(["recompress", "stack"]),
        "released_view": st.sampled_from(["own", "aggregate", "all_raw"]),
    },
)
near_task = st.fixed_dictionaries(
    {},
    optional={
        "privacy.mode": st.sampled_from(["none", "client-dp", "example-dp", "Example-DP"]),
        "privacy.epsilon": st.none() | st.floats(-1, 16),
        "privacy.delta": st.none() | st.floats(-1e-5, 2e-5),
        "train.local_steps": st.integers(-8, 50),
        "train.accumulation": st.integers(-2, 3),
    },
)


@given(near, near_task)
def test_just_what_is_within_the_policy_passes(some: Any, some_task: Any) -> None:
    changed = {"rounds": 20, "rank": 8, "cohort_at_least": 3, "strategy": "recompress", "released_view": "own"} | some
    task = FAIR | {"train.local_steps": 20, "train.accumulation": 2} | some_task
    within = (
        1 <= changed["rounds"] <= 20
        and 1 <= changed["rank"] <= 8
        and changed["cohort_at_least"] >= 3
        and changed["strategy"] == "recompress"
        and changed["released_view"] != "all_raw"
        and task["privacy.mode"] == "example-dp"
        and 0 <= (-1 if task["privacy.epsilon"] is None else task["privacy.epsilon"]) <= 8
        and 0 <= (-1 if task["privacy.delta"] is None else task["privacy.delta"]) <= 1e-5
        and task["train.local_steps"] >= 1
        and task["train.accumulation"] >= 1
        and task["train.local_steps"] * task["train.accumulation"] <= 40
    )
    assert passes(STRICT, terms(task, **changed)) is within


@given(st.sampled_from(["train", "evaluate"]) | nonsense, st.integers(-1, 25) | nonsense, st.integers() | nonsense)
def test_nonsense_in_an_instruction_is_refused(kind: Any, number: Any, num_bytes: Any) -> None:
    try:
        check_instruction(STRICT, kind, number, num_bytes, 0)
    except PolicyRefused:
        return
    assert kind in ("train", "evaluate")
    assert 0 <= number <= 20
    assert 0 <= num_bytes <= STRICT.max_bytes_down


def test_the_fair_terms_pass_and_each_lie_does_not() -> None:
    assert passes(STRICT, terms(FAIR, cohort_at_least=3))
    lies: dict[str, Any] = {
        "stack under another view": {"strategy": "stack", "released_view": "aggregate"},
        "no cohort": {"cohort_at_least": None},
        "a name like a path": {"run_id": "../../etc"},
        "the folder above": {"client_id": ".."},
        "a line in a name": {"client_id": "a\nb"},
        "rounds without end": {"rounds": 10**5000},
        "another protocol": {"protocol": 2},
        "a protocol that is true": {"protocol": True},
        "weights in capitals": {"hashes": {"weights": "AB" * 32}},
        "a rank that hides in the budget": {"budget": budget({"q_proj": 8, "v_proj": 9})},
        "a budget of infinite scale": {"budget": budget({"q_proj": 8}) | {"scale": {"q_proj": math.inf}}},
        "a budget of a huge scale": {"budget": budget({"q_proj": 8}) | {"scale": {"q_proj": 10**400}}},
        "half a budget": {"budget": {"train": {"q_proj": 8}}},
        "a schema that fills the disk": {"spec": ["ab" * 32, 2**60]},
        "a schema that fills the memory": {"spec": ["ab" * 32, 64 * 1024**2 + 1]},
        "a schema without a hash": {"spec": ["", 10]},
        "no heartbeats": {"heartbeat_s": 1e12},
        "a heartbeat that never waits": {"heartbeat_s": 0},
        "a heartbeat that hardly waits": {"heartbeat_s": 1e-9},
        "one huge chunk": {"chunk_bytes": 2**40},
        "a chunk that no message holds": {"chunk_bytes": 24 * 1024**2},
        "no weights": {"hashes": {"config": "ab" * 32}},
    }
    for name, lie in lies.items():
        assert not passes(STRICT, terms(FAIR, cohort_at_least=3) | lie), name
    for key in ("budget", "spec", "heartbeat_s", "chunk_bytes"):
        told = terms(FAIR, cohort_at_least=3)
        del told[key]
        assert not passes(STRICT, told), key
    assert not passes(STRICT, terms(FAIR))
    assert not passes(STRICT, terms(FAIR, cohort_at_least=3), None)


@pytest.mark.parametrize(
    "task",
    [
        {"privacy.mode": "local-dp"},
        {"privacy.mode": "EXAMPLE-DP"},
        {"privacy.mode": "none"},
        {"privacy.epsilon": None},
        {"privacy.epsilon": float("nan")},
        {"privacy.epsilon": float("inf")},
        {"privacy.epsilon": -1.0},
        {"privacy.epsilon": 10**400},
        {"privacy.delta": 1.0},
        {"privacy.delta": None},
        {"privacy.unit": "row"},
        {"privacy.nominal_examples": 10},
        {"train.local_steps": 20, "train.accumulation": 3},
        {"train.local_steps": 10**6},
        {"train.local_steps": -5, "train.accumulation": -5},
        {"train.local_steps": 0},
        {"train.batch_size": 2**20, "train.max_length": 2**20},
        {"train.batch_size": -8, "train.max_length": -128},
        {"evaluate.batch_size": 2**20},
        {"train.max_length": 2**21},
        {"seed": 2**63},
        {"rounds": 21},
        {"strategy.name": "stack"},
    ],
)
def test_a_task_that_slips_below_the_floor_is_refused(task: dict[str, Any]) -> None:
    assert not passes(STRICT, terms({**FAIR, **task}, cohort_at_least=3))


@pytest.mark.parametrize("dropped", ["privacy.mode", "privacy.epsilon", "privacy.delta"])
def test_silence_about_privacy_is_no_privacy(dropped: str) -> None:
    offered = terms(FAIR, cohort_at_least=3)
    del offered["task"][dropped]
    assert not passes(STRICT, offered)


def test_an_unknown_mode_is_refused_even_without_a_floor() -> None:
    assert not passes(Policy(), terms({"privacy.mode": "homomorphic"}))
    assert not passes(Policy(), terms({"task": "reward-model"}))


def test_a_budget_of_privacy_that_is_switched_off_is_none() -> None:
    policy = Policy(privacy=PrivacyFloor(max_epsilon=8.0, max_delta=1e-5))
    assert passes(policy, terms(FAIR))
    assert not passes(policy, terms({**FAIR, "privacy.mode": "none"}))


def test_stack_shows_raw_updates_whatever_view_it_claims() -> None:
    policy = Policy(raw_updates_to_peers=False)
    assert passes(policy, terms())
    assert not passes(policy, terms(strategy="stack", released_view="aggregate"))
    assert not passes(policy, terms(strategy="recompress", released_view="all_raw"))


def test_a_name_that_two_places_give_must_be_one() -> None:
    assert passes(Policy(), terms({"rounds": 20, "strategy.name": "recompress", "privacy.nominal_examples": None}))
    assert not passes(Policy(), terms({"rounds": 19}))
    assert not passes(Policy(), terms({"strategy.name": "residual"}))
