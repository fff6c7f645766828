"""From a config to what a run starts from: the base, the silos, and their examples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lamina.client.data import Encoder, Example, examples_of
from lamina.client.loading import BaseOptions, check_length, load_base
from lamina.client.model import Base
from lamina.client.rows import check_columns, columns_of, load_rows, text_columns
from lamina.client.split import is_number
from lamina.protos.config import Config, client_names, formats_of
from lamina.protos.errors import ConfigError
from lamina.simulations import corpora
from lamina.simulations.partition import deal


@dataclass(frozen=True, eq=False)
class Prepared:
    """Base and data of a run, which several runs may share.

    Attributes:
        base: The frozen base in full precision, on which adapters are evaluated.
        bases: Client id -> the base that it trains on: this one, or one in another number format.
        names: Client id -> silo name.
        train: Client id -> training examples.
        held_out: Client id -> held-out examples.
        labels: Ordered label list.
        corpus: See `corpora.corpus_record`.
    """

    base: Base
    bases: Mapping[str, Base]
    names: Mapping[str, str]
    train: Mapping[str, Sequence[Example]]
    held_out: Mapping[str, Sequence[Example]]
    labels: tuple[str, ...]
    corpus: Mapping[str, Any]


def prepare(config: Config, say: Callable[[str], None] = lambda text: None) -> Prepared:
    """Load the base and the data, deal rows to clients, and make examples.

    Args:
        config: A checked config.
        say: Told what is going on.

    Returns:
        What the run starts from.

    Raises:
        ConfigError: If the base, the data or the partition cannot be had.
    """
    data, task = config.data, config.task
    columns, needed = text_columns(data, task), columns_of(config)
    say(f"reading {data.source}")
    rows = corpora.stdlib_rows() if data.source == "stdlib" else load_rows(data.source, data)
    check_columns(rows, needed, f"data.source={data.source}")
    test_rows = None
    if not is_number(data.holdout):
        test_rows = load_rows(data.holdout, data)
        check_columns(test_rows, columns, f"data.holdout={data.holdout}")
    labels = _labels(config, rows)
    silos = deal(rows, test_rows, config)
    say(f"loading {config.model.source}")
    options = BaseOptions(
        source=config.model.source,
        revision=config.model.revision,
        task=task,
        labels=labels,
        kind=config.adapter.kind,
        target_modules=config.lora.target_modules,
        seed=config.seed,
        device=config.train.device,
        bits=config.quantisation.bits,
        compensation=config.quantisation.compensation,
    )
    base = load_base(options)
    bases = _bases(config, options, base, say)
    check_length(base, config.train.max_length)
    encoder = Encoder(base.tokenizer, data, task, labels, config.train.max_length)
    dealt = dict(zip(client_names(config), silos, strict=True))
    train = {client: examples_of(encoder, silo.train, f"silo {silo.name!r}", "train") for client, silo in dealt.items()}
    held_out = {
        client: examples_of(
            encoder, getattr(silo, config.evaluate.split), f"silo {silo.name!r}", config.evaluate.split
        )[: config.evaluate.max_examples]
        for client, silo in dealt.items()
    }
    return Prepared(
        base=base,
        bases=bases,
        names={client: silo.name for client, silo in dealt.items()},
        train=train,
        held_out=held_out,
        labels=labels,
        corpus=corpora.corpus_record(data.source, rows, columns),
    )


def _bases(config: Config, options: BaseOptions, base: Base, say: Callable[[str], None]) -> dict[str, Base]:
    """Each client's base; clients of one number format share one, and all share the schema of the full-precision one."""
    by_format = {base.format: base}
    found = {}
    for client, number_format in zip(client_names(config), formats_of(config), strict=True):
        number_format = base.format if number_format == "auto" else number_format
        if number_format not in by_format:
            say(f"loading {config.model.source} in {number_format}")
            wanted = replace(options, format=number_format, compute=config.quantisation.compute)
            by_format[number_format] = load_base(wanted)
            by_format[number_format].spec = base.spec
        found[client] = by_format[number_format]
    return found


def _labels(config: Config, rows: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    if config.task != "sequence-classification":
        return ()
    found = sorted({str(row[config.data.label_column]) for row in rows})
    labels = tuple(config.data.labels) or tuple(found)
    if len(labels) < 2:
        raise ConfigError(f"data.labels: expected at least two labels, got {len(labels)}. Check data.label_column.")
    if len(set(labels)) != len(labels):
        raise ConfigError("data.labels: expected each label once. Remove the repeats.")
    return labels
