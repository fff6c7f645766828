"""The checks on one update, alone: order, reasons, and that a refusal changes nothing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from lamina.protos.adapter import Adapter, LoraFactors, product
from lamina.protos.blobs import blob
from lamina.protos.codec import encode_update
from lamina.protos.errors import AdapterMismatch, UpdateRejected
from lamina.protos.messages import Update
from lamina.protos.sides import one_side, side_of
from lamina.protos.spec import AdapterSpec, from_json
from lamina.server.admission import MAX_EXAMPLES, Expected, admit, change_norm, size_cap_bytes
from tests.federation import MODULES, SCALE, budget, spec

PARENT = "f" * 64


def adapter(rank: int = 2, seed: int = 0) -> Adapter:
    rng = np.random.default_rng(seed)
    lora = {
        module: LoraFactors(
            rng.normal(size=(rank, d_in)).astype(np.float32), rng.normal(size=(d_out, rank)).astype(np.float32), SCALE
        )
        for module, (d_out, d_in) in MODULES.items()
    }
    return Adapter(lora, {"head.weight": rng.normal(size=(2, 3)).astype(np.float32)})


def update() -> Update:
    return Update("run", 3, "17", PARENT, adapter(), num_examples=5)


def expected(received: Adapter | None = None, max_norm: float | None = None) -> Expected:
    return Expected("run", 3, "17", PARENT, spec(), budget(2), received or Adapter(), max_norm)


def test_an_honest_update_passes_unchanged() -> None:
    got = admit(blob(encode_update(update(), "fp32")), expected(), set())
    assert (got.run_id, got.round, got.client_id, got.num_examples) == ("run", 3, "17", 5)
    for module in MODULES:
        assert got.adapter.lora[module].A.tobytes() == update().adapter.lora[module].A.tobytes()


@pytest.mark.parametrize(
    ("examples", "passes"), [(0, False), (1, True), (MAX_EXAMPLES, True), (MAX_EXAMPLES + 1, False)]
)
def test_the_bounds_of_num_examples(examples: int, passes: bool) -> None:
    payload = encode_update(replace(update(), num_examples=examples), "fp32")
    if passes:
        admit(blob(payload), expected(), set())
        return
    with pytest.raises(UpdateRejected) as caught:
        admit(blob(payload), expected(), set())
    assert caught.value.reason == "weight"


def test_the_message_says_who_when_what_and_what_to_do() -> None:
    small = replace(update(), adapter=adapter(rank=1))
    with pytest.raises(UpdateRejected) as caught:
        admit(blob(encode_update(small, "fp32")), expected(), set())
    message = str(caught.value)
    assert "client 17, round 3" in message
    assert "expected rank 2" in message
    assert "got 1" in message


def test_a_second_update_is_a_duplicate() -> None:
    with pytest.raises(UpdateRejected) as caught:
        admit(blob(encode_update(update(), "fp32")), expected(), {"17"})
    assert caught.value.reason == "duplicate"


def test_the_norm_is_that_of_the_products() -> None:
    one, start = adapter(seed=1), adapter(seed=2)
    squared = sum(float(np.square(product(one.lora[m]) - product(start.lora[m])).sum()) for m in MODULES) + float(
        np.square(one.dense["head.weight"].astype(float) - start.dense["head.weight"]).sum()
    )
    assert change_norm(one, start, spec()) == pytest.approx(np.sqrt(squared), rel=1e-9)


def test_the_norm_of_no_change_is_zero() -> None:
    assert change_norm(adapter(), adapter(), spec()) == 0.0


def test_the_norm_bound_is_inclusive() -> None:
    payload = encode_update(update(), "fp32")
    norm = change_norm(update().adapter, Adapter(), spec())
    admit(blob(payload), expected(max_norm=norm * 1.001), set())
    with pytest.raises(UpdateRejected) as caught:
        admit(blob(payload), expected(max_norm=norm * 0.999), set())
    assert caught.value.reason == "norm"


@pytest.mark.parametrize("rank", [1, 2, 7])
def test_the_size_cap_grows_with_the_budget_alone(rank: int) -> None:
    numbers = sum(rank * (d_out + d_in) for d_out, d_in in MODULES.values()) + 6
    assert 4 * numbers < size_cap_bytes(spec(), budget(rank)) < 4 * numbers + 2 * 1024**2


# One factor -----------------------------------------------------------------------------------------------------------


def with_cores(one: Adapter, seed: int = 0) -> Adapter:
    rng = np.random.default_rng(seed)
    lora = {m: replace(f, core=rng.normal(size=(f.rank, f.rank)).astype(np.float32)) for m, f in one.lora.items()}
    return Adapter(lora, one.dense)


def of_side(side: str, one: Adapter) -> Adapter:
    return Adapter({m: one_side(f, side) for m, f in one.lora.items()}, one.dense)  # type: ignore[arg-type]


@pytest.mark.parametrize("train", ["A", "B", "core"])
def test_the_factor_that_was_asked_for_is_admitted_and_nothing_else(train: str) -> None:
    start, cored = with_cores(adapter(seed=1)), with_cores(adapter())
    wanted = replace(expected(start), train=train)  # type: ignore[arg-type]
    got = admit(blob(encode_update(replace(update(), adapter=of_side(train, cored)), "fp32")), wanted, set())
    assert side_of(got.adapter, "") == train
    others = [of_side(other, cored) for other in ("A", "B", "core") if other != train]
    beside = [Adapter({m: replace(one_side(f, "B"), core=f.core) for m, f in cored.lora.items()}, cored.dense)]
    for wrong in (adapter(), cored, *others, *beside):
        with pytest.raises(UpdateRejected) as caught:
            admit(blob(encode_update(replace(update(), adapter=wrong), "fp32")), wanted, set())
        assert caught.value.reason == "schema"
    with pytest.raises(UpdateRejected) as caught:
        admit(blob(encode_update(replace(update(), adapter=of_side(train, cored)), "fp32")), expected(), set())
    assert caught.value.reason == "schema"
    with pytest.raises(UpdateRejected, match="no lora_core"):
        admit(blob(encode_update(replace(update(), adapter=cored), "fp32")), expected(), set())
    with pytest.raises(UpdateRejected) as caught:
        admit(
            blob(encode_update(replace(update(), adapter=of_side(train, with_cores(adapter(3)))), "fp32")),
            wanted,
            set(),
        )
    assert caught.value.reason == "rank"


@pytest.mark.parametrize("train", ["A", "B", "core"])
def test_the_norm_of_one_factors_change_is_that_of_the_product(train: str) -> None:
    start, after = adapter(seed=1), adapter(seed=0)
    if train == "core":
        start, after = with_cores(start, 1), with_cores(after, 0)
    sent = of_side(train, after)
    whole = Adapter(
        {m: replace(start.lora[m], **{train: getattr(f, train)}) for m, f in after.lora.items()},
        after.dense,
    )
    squared = sum(float(np.square(product(f) - product(start.lora[m])).sum()) for m, f in whole.lora.items())
    squared += float(np.square(after.dense["head.weight"].astype(float) - start.dense["head.weight"]).sum())
    payload = encode_update(replace(update(), adapter=sent), "fp32")
    for share, passes in ((1.001, True), (0.999, False)):
        wanted = replace(expected(start, max_norm=share * squared**0.5), train=train)  # type: ignore[arg-type]
        if passes:
            admit(blob(payload), wanted, set())
            continue
        with pytest.raises(UpdateRejected) as caught:
            admit(blob(payload), wanted, set())
        assert caught.value.reason == "norm"


@pytest.mark.parametrize(("value", "reason"), [(np.nan, "non-finite"), (np.inf, "non-finite"), (1e7, "norm")])
@pytest.mark.parametrize("train", ["A", "B", "core"])
def test_one_factor_is_looked_at_as_closely(train: str, value: float, reason: str) -> None:
    sent = of_side(train, with_cores(adapter()))
    next(iter(getattr(f, train) for f in sent.lora.values()))[0, 0] = value
    start = with_cores(adapter(seed=1)) if train == "core" else adapter(seed=1)
    wanted = replace(expected(start), train=train)  # type: ignore[arg-type]
    with pytest.raises(UpdateRejected) as caught:
        admit(blob(encode_update(replace(update(), adapter=sent), "fp32")), wanted, set())
    assert caught.value.reason == reason


def test_one_factor_has_a_cap_of_its_own() -> None:
    both, rows, columns, core = (size_cap_bytes(spec(), budget(5), train) for train in ("AB", "A", "B", "core"))
    assert rows - core == 4 * 5 * sum(d_in - 5 for _, d_in in MODULES.values())
    assert both - columns == 4 * 5 * sum(d_in for _, d_in in MODULES.values())
    assert both - rows == 4 * 5 * sum(d_out for d_out, _ in MODULES.values())


# The spec -------------------------------------------------------------------------------------------------------------


def test_a_spec_survives_json_bit_for_bit() -> None:
    first = AdapterSpec(MODULES, "sequence-classification", ("b", "a"), spec().dense, "tiny", {"weights": "ab"})
    again = from_json(first.to_json())
    assert (dict(again.modules), again.task, again.labels) == (dict(MODULES), "sequence-classification", ("b", "a"))
    assert again.dense["head.weight"].tobytes() == first.dense["head.weight"].tobytes()
    assert again.hashes == first.hashes


def test_ranks_are_clamped_to_the_shape() -> None:
    assert [spec().clamped(rank, "block.q_proj") for rank in (1, 7, 8, 100)] == [1, 7, 7, 7]


def test_shapes_are_paired_by_name_never_by_size() -> None:
    square = AdapterSpec({"m": (4, 4)})
    rows, columns = np.ones((2, 4), np.float32), np.ones((4, 2), np.float32)
    square.check(Adapter({"m": LoraFactors(rows, columns)}))
    with pytest.raises(AdapterMismatch, match="one base model"):
        square.check(Adapter({"m": LoraFactors(columns, rows)}))
    with pytest.raises(AdapterMismatch, match="by their names"):
        LoraFactors(rows, rows)
