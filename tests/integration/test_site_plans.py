"""A site's worker plans by what it is offered, and by what it can hold."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from lamina.client import participant, resident
from lamina.client import worker as module
from lamina.client.failures import failure_code
from lamina.client.hardware import profile
from lamina.client.loading import BaseOptions, load_base
from lamina.client.policy import Leave, Policy
from lamina.client.sizing import fitting, planner
from lamina.client.sizing.planner import NothingFits, Plan
from lamina.client.sizing.shape import shape_of
from lamina.client.work import Sized, nothing_private
from lamina.client.worker import SiteWorker
from lamina.protos import compose, ranks
from lamina.protos.blobs import blob
from lamina.protos.codec import decode, encode
from lamina.protos.errors import AdapterMismatch, ConfigError, PolicyRefused
from lamina.protos.messages import Instruction
from lamina.protos.spec import AdapterSpec
from lamina.server import campaign as campaigns
from lamina.server.port.terms import terms as terms_of

OFFERED = 16
TASK = (
    "train.local_steps=2",
    "train.batch_size=8",
    "train.max_length=32",
    f"clients.ranks={OFFERED}",
    "clients.count=1",
)


@pytest.fixture(scope="module")
def schema() -> AdapterSpec:
    return load_base(BaseOptions("tiny", device="cpu")).spec


@pytest.fixture(autouse=True)
def nothing_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sites that hold nothing yet, so that what there is for a plan is what the test says."""
    monkeypatch.setattr(resident, "now", lambda: 0)


@pytest.fixture
def rows(tmp_path: Any) -> Any:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f'{{"text": "def number_{n}(): return {n} + {n * n}"}}\n' for n in range(80)))
    return path


def offered(schema: AdapterSpec, *more: str, chosen: Mapping[str, int] | None = None) -> dict[str, Any]:
    config = compose.from_words([*TASK, *more])
    campaign = campaigns.campaign(config, schema, campaigns.budgets(config, schema), "run")
    return terms_of(config, campaign, blob(b"{}"), "0", OFFERED, campaigns.budget(config, schema, OFFERED, chosen), "")


def worker(rows: Any, *words: str, policy: Policy | None = None, said: list[str] | None = None) -> SiteWorker:
    config = compose.from_words([f"data.source={rows}", "train.device=cpu", *words])
    return SiteWorker(config, policy or Policy(), (said if said is not None else []).append)


def memory_of(schema: AdapterSpec, rows: Any, fits: Callable[[Plan], bool]) -> int:
    """Bytes with which a site's plan is so, near the most."""
    one = worker(rows)
    one.size(offered(schema), schema, None)
    assert one._fit is not None
    wanted, shape = one._fit.wanted, shape_of("tiny")
    for number in range(200 * 10**6, 10**6, -(10**5)):
        try:
            found = planner.plan(profile("cpu"), shape, replace(wanted, memory_bytes=number))
        except NothingFits:
            break
        if fits(found):
            return number
    raise AssertionError("no memory gives such a plan")


def without_room(sized: Sized) -> Any:
    """All but how much is free just now."""
    plan = {key: value for key, value in sized.kept["plan"].items() if key not in ("budget_bytes", "reasons")}
    return sized.wish, sized.kept["ranks"], plan


def plan_of(one: SiteWorker) -> Plan:
    assert one._fit is not None
    return one._fit.plan


def trained(one: SiteWorker, schema: AdapterSpec, sized: Sized, *more: str) -> dict[str, Any]:
    """Begin, train a round, and give the update's ranks and all that was sent."""
    told = offered(schema, *more, chosen=sized.kept["ranks"])
    one.begin(told, schema, {}, -1)
    found = one.train(instruction(schema), lambda step: None, nothing_private)
    update = decode(found.update)
    return {module: factors.rank for module, factors in update.lora.items()}


def instruction(schema: AdapterSpec) -> Instruction:
    from lamina.protos.adapter import EMPTY

    release = blob(encode(EMPTY, "fp32", np.random.default_rng(0)))
    return Instruction("run", 1, "0", release, None, 0)


def test_with_room_the_offer_is_taken_as_it_is(schema: AdapterSpec, rows: Any) -> None:
    one = worker(rows)
    sized = one.size(offered(schema), schema, None)
    assert (sized.wish.rank, sized.wish.ranks) == (None, None)
    assert sized.wish.format == "fp32"
    assert (plan_of(one).micro_batch, plan_of(one).accumulation, plan_of(one).checkpointing) == (8, 1, False)


@pytest.mark.parametrize(
    ("strategy", "train"), [("ffa", "B"), ("alternate", "turns"), ("core", "core"), ("stack", "AB")]
)
def test_a_plan_counts_what_the_strategy_trains(schema: AdapterSpec, rows: Any, strategy: str, train: str) -> None:
    one = worker(rows)
    one.size(offered(schema, f"strategy={strategy}"), schema, None)
    assert one._fit is not None
    assert one._fit.wanted.train == train


def test_norms_are_planned_registered_and_trained_without_ranks(rows: Any) -> None:
    words, said = ("adapter.kind=norm",), list[str]()
    schema = load_base(BaseOptions("tiny", kind="norm", device="cpu")).spec
    one = worker(rows, said=said)
    sized = one.size(offered(schema, *words), schema, None)
    assert (sized.wish.rank, sized.wish.ranks) == (None, None)
    found = plan_of(one)
    assert (found.rank, found.ranks) == (0, {})
    wanted = sum(value.size for value in schema.dense.values())
    assert found.terms["adapter, gradients and optimizer"] == 16 * wanted
    assert "the norms trained whole" in said[-1]
    again = worker(rows)
    assert again.size(offered(schema, *words), schema, json.loads(json.dumps(sized.kept))).kept == sized.kept
    told = offered(schema, *words, chosen={})
    one.begin(told, schema, {}, -1)
    update = decode(one.train(instruction(schema), lambda step: None, nothing_private).update)
    assert set(update.lora) == set()
    assert all(not np.array_equal(update.dense[name], first) for name, first in schema.dense.items())
    with pytest.raises(NothingFits, match="the norms trained whole"):
        worker(rows, "client.memory=1MB").size(offered(schema, *words), schema, None)
    other = load_base(BaseOptions("tiny", device="cpu")).spec
    with pytest.raises(AdapterMismatch, match="expected the modules and whole parameters"):
        worker(rows).begin(told, other, {}, -1)


def test_a_site_with_little_room_registers_what_it_then_trains(schema: AdapterSpec, rows: Any) -> None:
    said: list[str] = []
    number = memory_of(schema, rows, lambda found: found.rank < OFFERED)
    one = worker(rows, f"client.memory={number}", said=said)
    sized = one.size(offered(schema), schema, None)
    assert sized.wish.ranks is not None
    ranks.check(schema, sized.wish.ranks, OFFERED, {}, "uniform")
    found = plan_of(one)
    assert found.peak_bytes <= found.budget_bytes == number
    assert found.micro_batch * found.accumulation == 8
    assert trained(one, schema, sized) == dict(sized.wish.ranks)
    assert any(line.startswith("round 1: peak memory") and "predicted" in line for line in said)


def test_a_site_that_can_hold_nothing_says_the_smallest_that_there_is(schema: AdapterSpec, rows: Any) -> None:
    with pytest.raises(NothingFits, match="The smallest that there is"):
        worker(rows, "client.memory=20MB").size(offered(schema), schema, None)


def test_what_was_kept_is_taken_again_as_long_as_it_fits(schema: AdapterSpec, rows: Any) -> None:
    less = memory_of(schema, rows, lambda found: found.rank < OFFERED)
    first = worker(rows, f"client.memory={less}").size(offered(schema), schema, None)
    again = worker(rows, "client.memory=2GB").size(offered(schema), schema, first.kept)
    assert again == first
    other_question = worker(rows, "client.memory=2GB").size(offered(schema, "train.max_length=16"), schema, first.kept)
    assert other_question.wish.ranks is None
    least = memory_of(schema, rows, lambda found: found.rank < OFFERED // 2)
    tighter = worker(rows, f"client.memory={least}").size(offered(schema), schema, first.kept)
    assert ranks.numbers(schema, tighter.kept["ranks"]) < ranks.numbers(schema, first.kept["ranks"])
    damaged = worker(rows).size(offered(schema), schema, {**first.kept, "plan": {"format": 3}})
    assert damaged.wish.ranks is None


def test_only_ranks_and_format_leave_and_as_coarse_as_the_policy_says(schema: AdapterSpec, rows: Any) -> None:
    policy = Policy(leave=Leave(rank="coarse", format="hidden"))
    one = worker(rows, policy=policy)
    told = offered(schema)
    sized = one.size({**told, "rank": 11}, schema, None)
    assert sized.wish.format == ""
    assert set((sized.wish.ranks or {}).values()) == {8}
    assert set(vars(sized.wish)) == {"rank", "ranks", "format"}


def test_a_copy_that_is_not_trusted_is_not_loaded(schema: AdapterSpec, rows: Any, tmp_path: Any) -> None:
    from lamina.client.making import Wanted, make
    from lamina.client.quantised import copies

    make(Wanted("tiny", tmp_path / "copy", "nf4", "fp32"), lambda text: None)
    digest = copies.read(tmp_path / "copy").digest
    for listed, refused in (((), False), ((digest,), False), (("ab" * 32,), True)):
        one = worker(rows, f"model.source={tmp_path / 'copy'}", policy=Policy(manifests=listed))
        if refused:
            with pytest.raises(PolicyRefused, match="whose manifest is listed"):
                one.size(offered(schema), schema, None)
            with pytest.raises(PolicyRefused, match="whose manifest is listed"):
                one.begin(offered(schema), schema, {}, -1)
        else:
            assert one.size(offered(schema), schema, None).wish.format == "nf4"
            one.begin(offered(schema), schema, {}, -1)


def test_what_was_kept_under_another_policy_is_planned_anew(schema: AdapterSpec, rows: Any) -> None:
    told = offered(schema, "lora.allocation=importance", "train.max_length=16")
    kept = worker(rows).size(told, schema, None).kept
    assert worker(rows).size(told, schema, kept).kept == kept
    stricter = worker(rows, policy=Policy(leave=Leave(allocation=False))).size(told, schema, kept)
    assert stricter.wish.ranks is None
    coarser = worker(rows, policy=Policy(leave=Leave(rank="coarse"))).size(told, schema, kept)
    assert all(rank & (rank - 1) == 0 for rank in (coarser.wish.ranks or {"": 3}).values())


@pytest.mark.parametrize(
    "change",
    [
        {"peak_bytes": "1"}, {"peak_bytes": None}, {"peak_bytes": -5}, {"peak_bytes": 0}, {"budget_bytes": "z"},
        {"micro_batch": "8"}, {"micro_batch": 2.5}, {"micro_batch": 0}, {"micro_batch": 10**30}, {"max_length": 10**9},
        {"max_length": "x"}, {"format": "evil"}, {"format": 5}, {"optimizer": "sgd"}, {"checkpointing": "no"}, {"rank": True},
        {"ranks": {"x": 8}}, {"ranks": []}, {"terms": {"weights": float("inf")}}, {"terms": 3}, {"reasons": 3},
        {"seconds": float("nan")}, {"seconds": "1"}, {"more": 1},
    ],
)  # fmt: skip
def test_a_kept_plan_that_was_changed_is_not_believed(schema: AdapterSpec, rows: Any, change: dict[str, Any]) -> None:
    first = worker(rows).size(offered(schema), schema, None)
    again = worker(rows).size(offered(schema), schema, {**first.kept, "plan": {**first.kept["plan"], **change}})
    assert without_room(again) == without_room(first)


@pytest.mark.parametrize("ranks_kept", [{}, {"x": 8}, 3, None, {"": 10**12}, [["a", 1]]])
def test_kept_ranks_that_were_changed_are_not_believed(schema: AdapterSpec, rows: Any, ranks_kept: Any) -> None:
    first = worker(rows).size(offered(schema), schema, None)
    some = next(iter(schema.modules))
    for kept in (ranks_kept, {some: 0}, {some: -1}, {some: OFFERED + 1}, {some: float("inf")}, {some: "8"}):
        again = worker(rows).size(offered(schema), schema, {**first.kept, "ranks": kept})
        assert without_room(again) == without_room(first)


def test_a_sites_own_rank_is_trained_or_refused(schema: AdapterSpec, rows: Any) -> None:
    sized = worker(rows, "lora.rank=5").size(offered(schema), schema, None)
    assert set((sized.wish.ranks or {}).values()) == {5}
    with pytest.raises(ConfigError, match=r"lora\.rank=17: expected at most rank 16"):
        worker(rows, "lora.rank=17").size(offered(schema), schema, None)
    policy = Policy(leave=Leave(rank="coarse"))
    sized = worker(rows, "lora.rank=5", policy=policy).size(offered(schema), schema, None)
    assert (sized.wish.rank, set((sized.wish.ranks or {}).values())) == (None, {4})


def test_a_sites_micro_batch_is_one_of_the_runs_batch(schema: AdapterSpec, rows: Any) -> None:
    told = offered(schema, "train.batch_size=12")
    words = ("client.coordinator=127.0.0.1:1", "train.micro_batch=3")
    one = worker(rows, *words)
    one.size(told, schema, None)
    assert (plan_of(one).micro_batch, plan_of(one).accumulation) == (3, 4)
    with pytest.raises(ConfigError, match=r"expected a divisor of train\.batch_size=12"):
        worker(rows, words[0], "train.micro_batch=8").size(told, schema, None)


def test_after_running_out_of_memory_the_next_round_takes_less(
    schema: AdapterSpec, rows: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    one = worker(rows, said=said)
    sized = one.size(offered(schema), schema, None)
    one.begin(offered(schema), schema, {}, -1)
    before = plan_of(one)

    def full(*given: Any) -> Any:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried to …")

    honest: Callable[..., Any] = participant.respond
    monkeypatch.setattr(module, "respond", full)
    with pytest.raises(MemoryError) as caught:
        one.train(instruction(schema), lambda step: None, nothing_private)
    assert failure_code(caught.value) == "out-of-memory"
    after = plan_of(one)
    assert after.peak_bytes <= 0.8 * before.peak_bytes
    assert (after.rank, after.format, after.max_length) == (before.rank, before.format, before.max_length)
    assert after.micro_batch * after.accumulation == before.micro_batch * before.accumulation
    monkeypatch.setattr(module, "respond", honest)
    found = decode(one.train(instruction(schema), lambda step: None, nothing_private).update)
    assert {name: factors.rank for name, factors in found.lora.items()} == sized.kept["ranks"]


def test_after_a_round_that_took_more_than_there_is_the_next_takes_less(
    schema: AdapterSpec, rows: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = worker(rows, "client.memory=300MB")
    one.size(offered(schema), schema, None)
    one.begin(offered(schema), schema, {}, -1)
    before = plan_of(one)
    monkeypatch.setattr(resident, "peak", lambda device: 2 * before.budget_bytes)
    one.train(instruction(schema), lambda step: None, nothing_private)
    after = plan_of(one)
    assert after.peak_bytes < before.peak_bytes
    assert after.micro_batch == 1  # the least there is, as half of this base does not fit
    assert after.micro_batch * after.accumulation == 8
    assert one._run is not None
    assert one._run.site.train.micro_batch == after.micro_batch


def test_an_error_that_is_not_about_memory_stays_what_it_is(
    schema: AdapterSpec, rows: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = worker(rows)
    one.size(offered(schema), schema, None)
    one.begin(offered(schema), schema, {}, -1)

    def broken(*given: Any) -> Any:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(module, "respond", broken)
    with pytest.raises(RuntimeError, match="shapes"):
        one.train(instruction(schema), lambda step: None, nothing_private)


def test_where_less_is_free_at_a_round_than_was_planned_with_the_plan_shrinks(
    schema: AdapterSpec, rows: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = worker(rows)
    one.size(offered(schema), schema, None)
    one.begin(offered(schema), schema, {}, -1)
    before = plan_of(one)
    assert one._fit is not None
    held = one._imports + one._fit.held + int(0.9 * before.peak_bytes)
    monkeypatch.setattr(module, "host_memory", lambda: (10**9, 0))
    monkeypatch.setattr(resident, "now", lambda: held)
    one.train(instruction(schema), lambda step: None, nothing_private)
    after = plan_of(one)
    assert after.peak_bytes <= 0.9 * before.peak_bytes
    assert replace(after, ranks={}).rank == before.rank


def test_under_importance_only_the_modules_of_the_plan_get_ranks(
    schema: AdapterSpec, rows: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = offered(schema, "lora.allocation=importance", "train.max_length=16")
    one = worker(rows)
    sized = one.size(told, schema, None)
    assert sized.wish.ranks is not None
    assert len(set(sized.wish.ranks.values())) > 1
    ranks.check(schema, sized.wish.ranks, OFFERED, {}, "importance")
    assert "importance" in plan_of(one).terms
    some = [name for name in schema.modules if name.endswith(("q_proj", "v_proj"))]
    honest = fitting.fitted

    def fewer(*given: Any) -> Plan:
        found: Plan = honest(*given)
        return replace(found, modules="query and value", ranks={name: found.ranks[name] for name in some})

    monkeypatch.setattr(module, "fitted", fewer)
    sized = worker(rows).size(told, schema, None)
    assert sized.wish.ranks is not None
    assert set(sized.wish.ranks) <= set(some)
    uniform = ranks.uniform(schema, OFFERED)
    assert ranks.numbers(schema, sized.wish.ranks) <= ranks.numbers(schema, {name: uniform[name] for name in some})
    policy = Policy(leave=Leave(allocation=False))
    assert worker(rows, policy=policy).size(told, schema, None).wish.ranks == dict.fromkeys(some, OFFERED)
