"""A site's own data: its rows, dealt into what is trained on and what is held out, as examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lamina.client.data import Encoder, Example, examples_of
from lamina.client.rows import check_columns, columns_of, load_rows
from lamina.client.split import parts
from lamina.protos.config import Config
from lamina.protos.errors import DataError


@dataclass(frozen=True)
class OwnExamples:
    """What a site has.

    Attributes:
        train: Trained on.
        held_out: Measured on; may be empty.
    """

    train: Sequence[Example]
    held_out: Sequence[Example]


def own_examples(config: Config, labels: tuple[str, ...], tokenizer: Any) -> OwnExamples:
    """Read a site's rows and make examples of them.

    Args:
        config: Source, columns, length, split.
        labels: Ordered label list of the run.
        tokenizer: Of the base.

    Returns:
        The examples.

    Raises:
        DataError: If there are too few rows, or no examples.
    """
    data = config.data
    rows = load_rows(data.source, data)
    check_columns(rows, columns_of(config), f"data.source={data.source}")
    each_alone = config.privacy.mode == "example-dp"
    train, tune, test = parts(rows, data, config.task, each_alone)
    if len(train) < config.partition.min_examples:
        raise DataError(
            f"data.source={data.source}: expected at least {config.partition.min_examples} training rows, got {len(train)}."
        )
    encoder = Encoder(tokenizer, data, config.task, labels, config.train.max_length, each_alone)
    held_out = encoder.examples(tune if config.evaluate.split == "tune" else test)[: config.evaluate.max_examples]
    # No example at all is an error, but under example-dp: the length is the coordinator's, and it must not learn who is longer.
    found = encoder.examples(train) if each_alone else examples_of(encoder, train, data.source, "train")
    return OwnExamples(found, held_out)
