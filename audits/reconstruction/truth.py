"""What a client really trained on in a round: the seed that chose its batches chooses them again. For the evaluation alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from lamina.client.data import Example
from lamina.client.private.sampling import drawn, units_of
from lamina.client.train import batches
from lamina.protos import seeds
from lamina.protos.config import Config
from lamina.simulations.private import mechanisms


def trained_on(
    config: Config, examples: Mapping[str, Sequence[Example]], client: str, round_number: int
) -> list[Example]:
    """The examples of a client's steps in a round of a simulation, each once.

    Args:
        config: Of the run.
        examples: Client id -> its training set, as the run had it.
        client: Whose.
        round_number: From 1.

    Returns:
        In the order in which they first came.
    """
    mine, train = examples[client], config.train
    if config.privacy.mode == "example-dp":
        some = _poisson(config, examples, client, round_number)
    else:
        stream = batches(mine, train.batch_size, seeds.stream(config.seed, "batches", client, round_number))
        some = [example for _ in range(train.local_steps * train.accumulation) for example in next(stream)]
    return list({id(example): example for example in some}.values())


def _poisson(
    config: Config, examples: Mapping[str, Sequence[Example]], client: str, round_number: int
) -> list[Example]:
    """Who takes part does not depend on the noise, so none is calibrated."""
    plain = replace(config, privacy=replace(config.privacy, epsilon=None, noise_multiplier=100.0))
    private = mechanisms(plain, examples, lambda text: None)[client]
    mechanism = private.mechanism
    stream = private.stream("sampling", client, round_number)
    units = units_of(examples[client], mechanism.unit)
    return [
        example
        for _ in range(mechanism.steps)
        for share in drawn(units, mechanism.sample_rate, mechanism.user_rows, stream)
        for example in share.examples
    ]


def sources(example: Example) -> NDArray[np.int64]:
    """The tokens of an example whose inputs are in its gradient.

    Of text that is continued they end before the last target: nothing is predicted from what follows it, and no earlier token
    sees it. Of a labelled text they are all tokens.

    Args:
        example: The example.

    Returns:
        Ids in order.
    """
    if example.label >= 0:
        return example.tokens.astype(np.int64)
    last = int(np.flatnonzero(example.targets)[-1]) if example.targets.any() else 0
    return example.tokens[:last].astype(np.int64)


def tokens_of(examples: Sequence[Example]) -> NDArray[np.int64]:
    """The different tokens of some examples that their gradients know.

    Args:
        examples: Any number.

    Returns:
        Sorted ids, each once.
    """
    parts = [sources(example) for example in examples]
    return np.unique(np.concatenate(parts)) if parts else np.zeros(0, np.int64)
