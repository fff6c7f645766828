"""Laws of the planner: it never goes over, more is never worse, the same is the same, the batch is kept, it always answers."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina.client.hardware import Profile, Speed
from lamina.client.quantised.formats import menu
from lamina.client.sizing.memory import Shape
from lamina.client.sizing.planner import TIME_SHARE, NothingFits, Plan, Wanted, budget_of, plan
from lamina.protos.errors import ConfigError


def shape(hidden: int, layers: int, vocab: int) -> Shape:
    inner = 2 * hidden
    linears = {}
    for layer in range(layers):
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            linears[f"layers.{layer}.self_attn.{name}"] = (hidden, hidden)
        for name, sides in (
            ("gate_proj", (inner, hidden)),
            ("up_proj", (inner, hidden)),
            ("down_proj", (hidden, inner)),
        ):
            linears[f"layers.{layer}.mlp.{name}"] = sides
    return Shape(linears, 2 * vocab * hidden, hidden, inner, layers, hidden, hidden, vocab)


SHAPES = st.builds(shape, st.sampled_from([64, 256, 1024]), st.integers(1, 4), st.sampled_from([256, 8192]))
KINDS = st.sampled_from(
    [("cuda", (8, 0), ()), ("cuda", (7, 5), ()), ("cuda", (6, 1), ()), ("rocm", None, ()), ("mps", None, ()),
     ("cpu", None, ("avx2",)), ("cpu", None, ("avx512f", "amx_bf16"))]
)  # fmt: skip
SPEEDS = st.builds(Speed, st.floats(0, 0.5), st.floats(1e-6, 1e-2))


@st.composite
def profiles(draw: st.DrawFn) -> Profile:
    kind, capability, features = draw(KINDS)
    free = draw(st.integers(1_000_000, 40_000_000_000))
    found = Profile(kind, "x", free, free, 4, capability, features)
    if draw(st.booleans()):
        found = replace(found, speeds={name: draw(SPEEDS) for name, _ in menu(found).choices})
    return found


@st.composite
def wants(draw: st.DrawFn) -> Wanted:
    return Wanted(
        rank=draw(st.sampled_from([1, 3, 8, 64])),
        batch_size=draw(st.sampled_from([1, 6, 7, 16])),
        max_length=draw(st.sampled_from([2, 48, 128, 1024])),
        local_steps=draw(st.integers(1, 50)),
        deadline_s=draw(st.none() | st.floats(0.01, 1e5)),
        download_rank=draw(st.sampled_from([0, 16])),
        file_bytes=draw(st.sampled_from([0, 10**8, 10**10])),
        file_format=draw(st.sampled_from(["fp32", "bf16"])),
    )


def planned(profile: Profile, of: Shape, wanted: Wanted) -> Plan | None:
    try:
        return plan(profile, of, wanted)
    except NothingFits:
        return None


def worth(one: Plan | None, wanted: Wanted, profile: Profile) -> tuple[int, ...]:
    """What a person would compare: larger is better, and what is learned comes first."""
    if one is None:
        return (0,)
    names = ["query and value", "attention", "all"]
    order = [name for name, _ in menu(profile).choices]
    kept = (not one.checkpointing, one.optimizer == "adamw", one.micro_batch)
    return (1, one.max_length, names.index(one.modules), one.rank, -order.index(one.format), *map(int, kept))


@settings(max_examples=60, deadline=None)
@given(profiles(), SHAPES, wants())
def test_a_plan_fits_keeps_the_batch_and_is_the_same_again(profile: Profile, of: Shape, wanted: Wanted) -> None:
    one = planned(profile, of, wanted)
    assert one == planned(profile, of, wanted)
    if one is None:
        return
    assert one.peak_bytes <= one.budget_bytes == budget_of(profile, wanted) <= profile.free_bytes
    assert sum(one.terms.values()) <= one.peak_bytes
    assert one.micro_batch * one.accumulation == wanted.batch_size
    assert one.rank <= wanted.rank
    assert one.max_length <= wanted.max_length
    assert (one.format, one.compute) in menu(profile).choices
    if one.seconds is not None and wanted.deadline_s is not None:
        assert one.seconds <= TIME_SHARE * wanted.deadline_s
    assert len(one.reasons) >= 4


@settings(max_examples=60, deadline=None)
@given(profiles(), SHAPES, wants(), st.floats(1, 8))
def test_more_memory_is_never_worse(profile: Profile, of: Shape, wanted: Wanted, times: float) -> None:
    more = replace(profile, free_bytes=int(profile.free_bytes * times))
    less = worth(planned(profile, of, wanted), wanted, profile)
    assert worth(planned(more, of, wanted), wanted, profile) >= less


@settings(max_examples=60, deadline=None)
@given(profiles(), SHAPES, wants(), st.floats(1, 8))
def test_more_time_is_never_worse(profile: Profile, of: Shape, wanted: Wanted, times: float) -> None:
    if wanted.deadline_s is None:
        return
    longer = replace(wanted, deadline_s=wanted.deadline_s * times)
    assert worth(planned(profile, of, longer), wanted, profile) >= worth(planned(profile, of, wanted), wanted, profile)


@settings(max_examples=40, deadline=None)
@given(profiles(), SHAPES, wants())
def test_the_smallest_that_is_named_fits_its_own_peak(profile: Profile, of: Shape, wanted: Wanted) -> None:
    wanted = replace(wanted, deadline_s=None)
    with pytest.raises(NothingFits) as nothing:
        plan(replace(profile, free_bytes=1000), of, wanted)
    smallest = nothing.value.smallest
    room = replace(profile, free_bytes=2 * smallest.peak_bytes)
    assert plan(room, of, replace(wanted, memory_bytes=smallest.peak_bytes)).peak_bytes <= smallest.peak_bytes


@settings(max_examples=60, deadline=None)
@given(profiles(), SHAPES, wants(), st.floats(1, 8))
def test_a_file_that_is_read_fits_beside_the_base_and_a_smaller_file_is_never_worse(
    profile: Profile, of: Shape, wanted: Wanted, times: float
) -> None:
    one = planned(profile, of, wanted)
    if one is not None and profile.kind == "cpu" and one.format != wanted.file_format:
        assert wanted.file_bytes + one.terms["weights"] <= one.budget_bytes
    smaller = replace(wanted, file_bytes=int(wanted.file_bytes / times))
    assert worth(planned(profile, of, smaller), wanted, profile) >= worth(one, wanted, profile)
    if profile.kind != "cpu":
        assert one == planned(profile, of, replace(wanted, file_bytes=0))


@settings(max_examples=40, deadline=None)
@given(profiles(), SHAPES, wants(), st.sampled_from([("nf4", "fp32"), ("int8", "bf16"), ("mixed", "fp32")]))
def test_a_copy_is_planned_in_its_own_format_alone(
    profile: Profile, of: Shape, wanted: Wanted, copy: tuple[str, str]
) -> None:
    modules = {module: ("nf4", "int8")[index % 2] for index, module in enumerate(of.linears)}
    asked = replace(wanted, only=copy, file_bytes=0, module_formats=modules if copy[0] == "mixed" else {})
    one = planned(profile, of, asked)
    if one is not None:
        assert (one.format, one.compute) == copy
        if copy[0] == "mixed":
            assert one.terms["weights"] < 4 * of.parameters
    others = tuple({"fp32", "nf4", "int8", "mixed", "bf16"} - {copy[0]})
    with pytest.raises(ConfigError, match=f"is set to {copy[0]}"):
        plan(profile, of, replace(asked, formats=others))


def test_what_failed_its_self_test_is_never_planned() -> None:
    of, wanted = shape(256, 2, 256), Wanted()
    machine = Profile("cuda", "x", 10**10, 10**10, 1, (8, 0), failed=("bf16", "nf4"))
    assert plan(machine, of, wanted).format == "int8"
    with pytest.raises(ConfigError, match="earlier probe found that bf16, nf4, int8 do not"):
        plan(replace(machine, failed=("bf16", "nf4", "int8")), of, wanted)
    with pytest.raises(ConfigError, match="Allow one of these"):
        plan(machine, of, replace(wanted, formats=("fp16",)))
