"""The largest useful training that a device can hold and finish in a round: a pure function, the same for the same input.

A fixed grid of ways to train is gone through. What does not fit the memory or the time is dropped; of the rest the best by a
fixed order is taken, in which what is learned comes before how: length of the examples, then the trained modules, then rank,
then the number format, then whether activations are kept, then the micro-batch. Neither grid nor order looks at how much memory
or time there is, so that more of either never makes a plan worse.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from lamina.client.hardware import Profile, size
from lamina.client.quantised.formats import held, menu
from lamina.client.sizing.memory import (
    OVERSAMPLED,
    RUNTIME_BYTES,
    Shape,
    Step,
    peak_bytes,
    terms,
)
from lamina.protos.errors import ConfigError
from lamina.protos.ranks import SPREAD

# The model of memory is that good; and the share of what is free that may be used.
SAFETY, SHARE = 1.10, 0.90
# Of a round's time, the rest is for the network and the coordinator.
TIME_SHARE = 0.8
# Of an accelerator's driver and libraries, until a probe says what they take; not measured by us.
_CONTEXT_BYTES = {"cuda": 700 * 10**6, "rocm": 700 * 10**6, "xpu": 700 * 10**6}
_MODULES = (
    ("all", ()),
    ("attention", ("q_proj", "k_proj", "v_proj", "o_proj", "c_attn", "query", "key", "value")),
    ("query and value", ("q_proj", "v_proj", "query", "value")),
)


@dataclass(frozen=True)
class Wanted:
    """What the experiment asks, and what the site allows.

    Attributes:
        rank: Largest rank of a layer.
        batch_size: Examples of a batch; it is kept, in one forward pass or several.
        accumulation: Batches of an optimizer step; kept, too.
        max_length: Tokens of an example.
        local_steps: Optimizer steps of a round.
        targets: Linear layers that the run adapts; empty for all.
        deadline_s: Of a round, or None.
        formats: Number formats that the site allows, or none for all.
        memory_bytes: The most that the site lets training take, or None.
        download_rank: Rank of the frozen part that may come beside the trainable one.
        compensation: Rank of the base's compensation factors.
        dense: Parameters that are trained whole.
        train: What of a round has gradients, one of `memory.TRAINED`; with `norm` and `head` there are no factors.
        by_row: Gradients that are held for each example of a forward pass by itself, 0 where they are added up at once.
        whole: Whether every layer must have the rank that was asked.
        only: The number format and the compute format that must be taken, such as a quantised copy's, or None for the best.
        importance: Whether ranks are chosen by importance, which is scored with more columns than are trained.
        micro_batch: Examples of a forward pass, where the site has decided.
        checkpointing: Whether activations are computed again, where the site has decided.
        optimizer: Its name, where the site has decided.
        file_bytes: Of the full-precision file, which a processor reads whole to make a base in another format; 0 for a copy.
        file_format: Number format of that file.
        module_formats: Of a mixed copy: linear layer -> number format.
    """

    rank: int = 8
    batch_size: int = 8
    accumulation: int = 1
    max_length: int = 128
    local_steps: int = 20
    targets: tuple[str, ...] = ()
    deadline_s: float | None = None
    formats: tuple[str, ...] = ()
    memory_bytes: int | None = None
    download_rank: int = 0
    compensation: int = 0
    dense: int = 0
    train: str = "AB"
    by_row: int = 0
    whole: bool = False
    only: tuple[str, str] | None = None
    importance: bool = False
    micro_batch: int | None = None
    checkpointing: bool | None = None
    optimizer: str | None = None
    file_bytes: int = 0
    file_format: str = "fp32"
    module_formats: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """How to train.

    Attributes:
        format: Number format of the linear layers.
        compute: Of activations.
        rank: Of every trained layer; 0 where what is trained has no factors.
        modules: Which layers, by a name; or what is trained in their place.
        ranks: Module -> rank, clamped to its sides.
        micro_batch: Examples in a forward pass.
        accumulation: Forward passes in an optimizer step.
        max_length: Tokens of an example.
        checkpointing: Whether activations are computed again.
        optimizer: Its name.
        terms: Bytes by what they are for.
        peak_bytes: Their sum, or that of loading.
        budget_bytes: What the device gives.
        seconds: Of a round, or None where no speed was measured.
        reasons: A sentence for each choice.
    """

    format: str
    compute: str
    rank: int
    modules: str
    ranks: Mapping[str, int]
    micro_batch: int
    accumulation: int
    max_length: int
    checkpointing: bool
    optimizer: str
    terms: Mapping[str, int]
    peak_bytes: int
    budget_bytes: int
    seconds: float | None = None
    reasons: tuple[str, ...] = field(default=())


class NothingFits(ConfigError):
    """No way to train fits a device.

    Args:
        message: What is short, and the smallest that would do.
        smallest: The plan of the smallest peak.
    """

    def __init__(self, message: str, smallest: Plan) -> None:
        super().__init__(message)
        self.smallest = smallest


def budget_of(profile: Profile, wanted: Wanted) -> int:
    """Bytes that training may take.

    Args:
        profile: The device.
        wanted: With the site's own bound.

    Returns:
        A share of what is free, or the site's bound where that is less.
    """
    free = int(profile.free_bytes * SHARE)
    return free if wanted.memory_bytes is None else min(free, wanted.memory_bytes)


def choices_of(profile: Profile, wanted: Wanted) -> list[tuple[str, str]]:
    """The number formats that may be planned.

    Args:
        profile: The device.
        wanted: What the site allows, and what it has decided or its source is.

    Returns:
        (format, compute format), the preferred first.
    """
    choices = menu(profile).choices if wanted.only is None else (wanted.only,)
    return [one for one in choices if one[0] not in profile.failed and (not wanted.formats or one[0] in wanted.formats)]


def read_bytes(profile: Profile, wanted: Wanted, number_format: str) -> int:
    """Of a full-precision file, what is in memory beside the base that is made from it.

    Args:
        profile: The device.
        wanted: With the file.
        number_format: Of the base.

    Returns:
        0 where the file's own format is kept, or the base is not in the host's memory.
    """
    return 0 if number_format == wanted.file_format or profile.kind != "cpu" else wanted.file_bytes


def plan(profile: Profile, shape: Shape, wanted: Wanted) -> Plan:
    """The best training that a device can hold and finish.

    Args:
        profile: The device.
        shape: The model.
        wanted: What is asked and allowed.

    Returns:
        The plan, with the reason for each choice.

    Raises:
        NothingFits: If none does; it names the smallest that there is.
        ConfigError: If the device can train with none of the number formats that are allowed.
    """
    choices = choices_of(profile, wanted)
    asked = wanted.formats or (wanted.only or ())[:1] or profile.failed
    if not choices and set(asked) & set(profile.failed):
        raise ConfigError(
            f"plan: expected a number format that trains on {profile.kind}, but an earlier probe found that "
            f"{', '.join(profile.failed)} do not. `lamina plan probe=again` looks anew."
        )
    if not choices:
        able = ", ".join(one[0] for one in menu(profile).choices) or "none that passed its self-test"
        raise ConfigError(
            f"plan: expected a number format that trains on {profile.kind}, which are {able}, got "
            f"{', '.join(wanted.formats) or 'none'}. Allow one of these."
            + (f" The site or its copy of the base is set to {wanted.only[0]}." if wanted.only else "")
        )
    smallest: Plan | None = None
    slow: Plan | None = None
    for one in _grid(profile, shape, wanted, choices):
        if smallest is None or one.peak_bytes < smallest.peak_bytes:
            smallest = one
        if one.peak_bytes > one.budget_bytes or (wanted.deadline_s and one.seconds is None and profile.speeds):
            continue  # what was not measured, where others were, is no way out of a deadline
        if _in_time(one, wanted):
            return replace(one, reasons=tuple(_reasons(one, profile, wanted)))
        slow = slow or one
    assert smallest is not None
    raise NothingFits(_why_not(smallest, slow, wanted), smallest)


def _grid(profile: Profile, shape: Shape, wanted: Wanted, choices: list[tuple[str, str]]) -> Iterator[Plan]:
    """Every way to train, the best first."""
    optimizers = menu(profile).optimizers if wanted.optimizer is None else (wanted.optimizer,)
    checkpointings = (False, True) if wanted.checkpointing is None else (wanted.checkpointing,)
    micros = _divisors(wanted.batch_size) if wanted.micro_batch is None else [wanted.micro_batch]
    for length in _halves(wanted.max_length, min(32, wanted.max_length)):
        for name, targets in _layers(shape, wanted):
            for rank in _halves(wanted.rank, wanted.rank if wanted.whole else 1) if targets else [0]:
                ranks = {module: min(rank, *shape.linears[module]) for module in targets}
                for number_format, compute in choices:
                    for checkpointing in checkpointings:
                        for optimizer in optimizers:
                            for micro in micros:
                                yield _point(
                                    profile, shape, wanted, name, rank, ranks, number_format, compute, checkpointing, optimizer,
                                    micro, length,
                                )  # fmt: skip


def _point(
    profile: Profile, shape: Shape, wanted: Wanted, name: str, rank: int, ranks: Mapping[str, int], number_format: str,
    compute: str, checkpointing: bool, optimizer: str, micro: int, length: int,
) -> Plan:  # fmt: skip
    step = Step(
        default=number_format,
        compute=compute,
        formats=wanted.module_formats
        or {m: compute for m, sides in shape.linears.items() if held(number_format, compute, sides) != number_format},
        ranks=ranks,
        tokens=micro * length,
        checkpointing=checkpointing,
        optimizer=optimizer,
        frozen={m: min(wanted.download_rank, *shape.linears[m]) for m in ranks} if wanted.download_rank else {},
        compensation=dict.fromkeys(shape.linears, wanted.compensation)
        if number_format in ("nf4", "int8", "mixed")
        else {},
        dense=wanted.dense,
        train=wanted.train,
        by_row=wanted.by_row * micro,
        file_bytes=read_bytes(profile, wanted, number_format),
    )
    overhead = profile.overhead_bytes.get(number_format, _CONTEXT_BYTES.get(profile.kind, RUNTIME_BYTES))
    speed = profile.speeds.get(number_format)
    passes = wanted.batch_size // micro * wanted.accumulation
    counted = terms(shape, step, overhead)
    if wanted.importance:
        # Slots of four times the rank and eight more columns, one and a half times what training takes at so many.
        more = 1.5 * (SPREAD * rank + OVERSAMPLED) / (SPREAD * rank) - 1
        counted["importance"] = int(more * counted["adapter, gradients and optimizer"])
    seconds = None
    if speed is not None:
        again = 1.35 if checkpointing else 1.0
        seconds = wanted.local_steps * passes * (speed.fixed_s + again * speed.token_s * micro * length)
    return Plan(
        format=number_format,
        compute=compute,
        rank=rank,
        modules=name,
        ranks=ranks,
        micro_batch=micro,
        accumulation=passes,
        max_length=length,
        checkpointing=checkpointing,
        optimizer=optimizer,
        terms=counted,
        peak_bytes=int(SAFETY * max(sum(counted.values()), peak_bytes(shape, step, overhead))),
        budget_bytes=budget_of(profile, wanted),
        seconds=seconds,
    )


def _halves(largest: int, least: int) -> list[int]:
    """The largest, and half of it as long as that is at least the least."""
    found = [largest]
    while found[-1] // 2 >= least:
        found.append(found[-1] // 2)
    return found


def _divisors(batch_size: int) -> list[int]:
    """Micro-batches that keep the batch, the largest first."""
    return [size for size in range(batch_size, 0, -1) if batch_size % size == 0]


def _layers(shape: Shape, wanted: Wanted) -> Iterator[tuple[str, list[str]]]:
    """Which layers get factors, by a name, the most first; none, once, where what is trained has no factors."""
    if wanted.train in ("norm", "head"):
        yield f"the {wanted.train}{'s' if wanted.train == 'norm' else ''}", []
        return
    asked = [m for m in shape.linears if not wanted.targets or m in wanted.targets]
    for name, suffixes in _MODULES[:1] if wanted.whole else _MODULES:
        targets = [m for m in asked if not suffixes or m.rpartition(".")[2] in suffixes]
        if targets:
            yield name, targets


def trained(one: Plan) -> str:
    """What a plan trains, in words.

    Args:
        one: The plan.

    Returns:
        Such as `rank 8 on all layers`.
    """
    return f"rank {one.rank} on {one.modules} layers" if one.ranks else f"{one.modules} trained whole"


def _in_time(one: Plan, wanted: Wanted) -> bool:
    return one.seconds is None or wanted.deadline_s is None or one.seconds <= TIME_SHARE * wanted.deadline_s


def _reasons(one: Plan, profile: Profile, wanted: Wanted) -> Iterator[str]:
    room = f"{size(one.peak_bytes)} of {size(one.budget_bytes)}"
    yield f"{one.format} base, {one.compute} activations: what {profile.kind} trains with, and it fits: {room}."
    if one.max_length < wanted.max_length:
        yield (
            f"examples of {one.max_length} tokens, not {wanted.max_length}: longer ones do not fit or finish with any rank "
            "or format."
        )
    if one.ranks and one.modules != "all":
        yield f"only the {one.modules} layers: all of them do not fit or finish at this length."
    more = f"rank {one.rank}: twice of it does not fit or finish."
    as_asked = one.rank == wanted.rank or not one.ranks
    yield (f"rank {one.rank}" if one.ranks else trained(one)) + ", as was asked." if as_asked else more
    if one.checkpointing:
        yield "activations are computed again in the backward pass: kept, they do not fit."
    yield (
        f"{one.micro_batch} examples at a time, {one.accumulation} times: a batch of {wanted.batch_size * wanted.accumulation}, "
        "as the experiment asks."
    )
    if one.optimizer != "adamw":
        yield f"{one.optimizer}: AdamW's moments do not fit."
    yield (
        "time: no speed was measured; `lamina plan probe=true` does."
        if one.seconds is None
        else (
            f"time: about {one.seconds:.0f} s of a round"
            + (f" of {wanted.deadline_s:g} s." if wanted.deadline_s else ".")
        )
    )


def _why_not(smallest: Plan, slow: Plan | None, wanted: Wanted) -> str:
    if slow is not None and slow.seconds is not None:
        return (
            f"plan: expected a round within {wanted.deadline_s:g} s, the best that fits takes {slow.seconds:.0f} s. Ask the "
            "coordinator for fewer train.local_steps or a longer clients.deadline_s."
        )
    reading = smallest.peak_bytes > SAFETY * sum(smallest.terms.values()) + 1
    remedy = "Take a smaller model, or free memory."
    if wanted.memory_bytes == smallest.budget_bytes:
        remedy = "Take a smaller model, or raise the bound (client.memory; memory= of `lamina plan`), of which data take a part."
    if reading:
        remedy = "Most of it is to read the full-precision file beside it: make a copy where there is room (`lamina quantise`)."
    return (
        f"plan: expected room for {size(smallest.peak_bytes)}, there is {size(smallest.budget_bytes)}. The smallest that there "
        f"is: {smallest.format} base, {trained(smallest)}, {smallest.max_length} tokens. " + remedy
    )
