"""Which modules a client's rank goes to: those whose loss gradient on its own text is largest, for the size of the module.

A module's gradient G, d_out x d_in, is never formed. The slots that are there anyway sketch it, as in the randomised SVD of
Halko, Martinsson and Tropp (2011): with random rows in A and B = 0 the gradient of B is G A'; with its orthonormal basis Q in B
and A = 0 the gradient of A is Q' G, which has the singular values of G as far as Q spans it. The product of the slots is zero
both times, so the model computes what the base computes. A quantised base is scored like any other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lamina.client.data import Encoder, Example, examples_of
from lamina.client.losses import collate, losses, pad_id
from lamina.client.model import SLOT, Base, put, set_checkpointing, training_mode
from lamina.client.rows import check_columns, load_rows, text_columns
from lamina.client.sizing.memory import OVERSAMPLED
from lamina.client.train import autocast, batches
from lamina.protos import seeds
from lamina.protos.adapter import EMPTY, Adapter, Array, LoraFactors
from lamina.protos.config import Config, TrainConfig
from lamina.protos.errors import ConfigError, TrainingError
from lamina.protos.ranks import most, numbers, uniform
from lamina.protos.spec import AdapterSpec

Scores = Mapping[str, NDArray[np.float64]]
# Training batches that a gradient is the mean of.
BATCHES = 8


def chosen_ranks(
    config: Config, base: Base, examples: Sequence[Example], rank: int, client_id: str = ""
) -> dict[str, int]:
    """What a client trains under `lora.allocation=importance`.

    Args:
        config: Training settings, rank pattern, public data, privacy mode, seed.
        base: The base that the client trains on; its slots are empty afterwards.
        examples: The client's training examples; not looked at where there is public data.
        rank: The client's nominal rank.
        client_id: Its name, of which the batches depend.

    Returns:
        Module -> rank, in the order of the schema, of no more numbers than the nominal rank everywhere; a module that is absent
        is not trained.

    Raises:
        ConfigError: If a privacy mode has no public data, or that cannot be read.
        TrainingError: If a gradient is not finite.
    """
    check_public(config)
    if config.lora.public_data:
        # Then the choice depends on nothing of the client but its rank.
        examples, client_id = _public(config, base), ""
    largest = most(base.spec, rank, config.lora.rank_pattern)
    columns = {module: base.spec.clamped(wanted + OVERSAMPLED, module) for module, wanted in largest.items()}
    found = scores(base, examples, columns, config.train, config.seed, client_id)
    return allocated(base.spec, by_size(base.spec, found), rank, config.lora.rank_pattern)


def by_size(spec: AdapterSpec, found: Scores) -> Scores:
    """Singular values times the numbers of their matrix.

    Adam moves every number by about as much, whatever its gradient, so that one rank moves a large matrix further than a small
    one. Plain singular values favour small attention matrices and did worse than uniform ranks; see docs/log.md.

    Args:
        spec: Module shapes.
        found: See `scores`.

    Returns:
        What `allocated` is to go by.
    """
    return {module: values * float(np.prod(spec.modules[module])) for module, values in found.items()}


def check_public(config: Config) -> None:
    """Raise where ranks would tell of private text: under a privacy mode they may be chosen on public data only.

    Args:
        config: Privacy mode and public data.

    Raises:
        ConfigError: If there is a mode and no such data.
    """
    if config.privacy.mode != "none" and not config.lora.public_data:
        raise ConfigError(
            f"lora.allocation=importance with privacy.mode={config.privacy.mode}: expected lora.public_data, text that anybody "
            "may see, got none. The ranks that a site chooses tell of the text that they were chosen on, and no ledger counts "
            "that. Set lora.public_data, or lora.allocation=uniform."
        )


def _public(config: Config, base: Base) -> list[Example]:
    where = f"lora.public_data={config.lora.public_data}"
    # A revision is of data.source.
    data = replace(config.data, revision="")
    rows = load_rows(config.lora.public_data, data)
    check_columns(rows, text_columns(data, config.task), where)
    encoder = Encoder(base.tokenizer, data, config.task, base.spec.labels, config.train.max_length)
    return examples_of(encoder, rows, where, "importance")


def allocated(spec: AdapterSpec, found: Scores, rank: int, pattern: Mapping[str, int] | None = None) -> dict[str, int]:
    """The ranks that catch the largest sum of squared values for their numbers.

    A module's i-th rank costs d_out + d_in numbers and catches the square of its i-th value. They are taken by what they catch a
    number until one no longer fits, so that at most one rank of the largest module is left unspent and a larger sum to spend
    never takes a rank away. Ties, zeros among them, go to lower ranks first and then by the schema's order: without
    scores the ranks are uniform.

    Args:
        spec: Module shapes.
        found: Module -> values, falling; missing ones count as zero.
        rank: The nominal rank, which says how many numbers there are to spend and how many ranks a module may get.
        pattern: Module-name suffix -> largest rank there.

    Returns:
        Module -> rank, in the schema's order; modules that get none are absent.
    """
    return spent(spec, found, most(spec, rank, pattern), numbers(spec, uniform(spec, rank, pattern)))


def spent(spec: AdapterSpec, found: Scores, largest: Mapping[str, int], budget: int) -> dict[str, int]:
    """As `allocated`, with the bounds given.

    Args:
        spec: Module shapes.
        found: Module -> values, falling.
        largest: Module -> most ranks.
        budget: How many numbers there are to spend.

    Returns:
        Module -> rank; modules that get none are absent.
    """
    # Relative to the largest, so that no square is lost to underflow.
    unit = max((float(values[0]) for values in found.values() if values.size), default=0.0) or 1.0
    claims = []
    for order, (module, shape) in enumerate(spec.modules.items()):
        values = found.get(module, np.zeros(0))
        for index in range(largest.get(module, 0)):
            caught = (float(values[index]) / unit) ** 2 if index < values.size else 0.0
            claims.append((-caught / sum(shape), index, order, module))
    ranks: dict[str, int] = {}
    for _, _, _, module in sorted(claims):
        budget -= sum(spec.modules[module])
        if budget < 0:
            break
        ranks[module] = ranks.get(module, 0) + 1
    return {module: ranks[module] for module in spec.modules if module in ranks}


def scores(
    base: Base,
    examples: Sequence[Example],
    columns: Mapping[str, int],
    config: TrainConfig,
    seed: int,
    client_id: str = "",
) -> Scores:
    """Leading singular values of each module's loss gradient at the base, the mean over a few training batches.

    Takes the time of twice `BATCHES` training steps, and in memory slots of that many columns with a gradient for one side:
    with four times the rank that is about one and a half times what adapter and optimizer take in training.

    Args:
        base: The base; its slots are empty afterwards, whatever happens.
        examples: What to compute losses on.
        columns: Module -> columns of its sketch, at most the shorter side of its shape; with that many the values are exact.
        config: Batch size, accumulation, micro-batch, checkpointing, precision.
        seed: Of the run.
        client_id: Of which batches and sketches depend too.

    Returns:
        Module -> as many values as columns, falling; in nats per target for a unit change of the weight.

    Raises:
        TrainingError: If a gradient is not finite.
    """
    size = config.micro_batch or config.batch_size
    stream = batches(examples, config.batch_size, seeds.stream(seed, "importance", client_id))
    drawn = islice(stream, BATCHES * config.accumulation)
    micro = [batch[start : start + size] for batch in drawn for start in range(0, len(batch), size)]
    noise = seeds.integer(seed, "importance-dropout", client_id)
    names = [module for module in base.spec.modules if columns.get(module)]
    if config.checkpointing is not None:
        set_checkpointing(base, config.checkpointing)
    try:
        _fill(base, {m: LoraFactors(*_rows(base, m, columns[m], seed, client_id), 1.0) for m in names})
        sketched = _gradients(base, micro, "lora_B", config.precision, noise)
        _fill(base, {m: LoraFactors(*_columns(base, m, sketched.pop(m)), 1.0) for m in names})
        projected = _gradients(base, micro, "lora_A", config.precision, noise)
        return {m: np.linalg.svd(values.astype(np.float64), compute_uv=False) for m, values in projected.items()}
    finally:
        put(base, EMPTY, None, trainable=False)


def _rows(base: Base, module: str, columns: int, seed: int, client_id: str) -> tuple[Array, Array]:
    """Random orthonormal rows for A, and B = 0."""
    d_out, d_in = base.spec.modules[module]
    drawn = seeds.stream(seed, "sketch", client_id, module).standard_normal((d_in, columns))
    return _orthonormal(drawn).T, np.zeros((d_out, columns), np.float32)


def _columns(base: Base, module: str, sketched: Array) -> tuple[Array, Array]:
    """A = 0, and for B a basis of what was sketched."""
    return np.zeros((sketched.shape[1], base.spec.modules[module][1]), np.float32), _orthonormal(sketched)


def _orthonormal(matrix: NDArray[Any]) -> Array:
    """A basis of the columns."""
    return np.asarray(np.linalg.qr(matrix.astype(np.float64))[0], np.float32)


def _fill(base: Base, factors: Mapping[str, LoraFactors]) -> None:
    put(base, Adapter(factors), None, trainable=False)


def _gradients(
    base: Base, micro: Sequence[Sequence[Example]], side: str, precision: str, noise: int
) -> dict[str, Array]:
    """Gradient of the mean loss over all targets, for one side of every slot that is filled."""
    slots = {}
    for module in base.spec.modules:
        slot = getattr(base.layer(module), side)[SLOT].weight
        if slot.numel():
            slots[module] = slot.requires_grad_(True)
    count = 0
    with training_mode(base):  # which is what has activations computed again, where that is on
        for number, examples in enumerate(micro):
            # Dropout must be the same in both passes, or they would sketch two matrices.
            torch.manual_seed(noise + number)
            batch = collate(examples, pad_id(base), base.device)
            with autocast(base.device, precision):
                summed, _, targets = losses(base, batch)
            summed.backward()  # type: ignore[no-untyped-call]
            count += targets
    found = {}
    for module, slot in slots.items():
        # A module that the loss does not depend on has none.
        gradient = torch.zeros_like(slot) if slot.grad is None else slot.grad / max(1, count)
        found[module] = np.asarray(gradient.detach().float().cpu().numpy())
        if not np.isfinite(found[module]).all():
            raise TrainingError(
                f"importance: expected finite gradients, got others in {module}. Set lora.allocation=uniform."
            )
    return found
