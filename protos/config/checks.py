"""Whether a config is possible: each value alone, then values together. Every message says what to set instead."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from lamina.protos.config.tree import Config, value_of
from lamina.protos.errors import ConfigError, nearest

FORMATS = ("fp32", "bf16", "nf4", "int8", "mixed", "int8wo", "fp8wo")
KINDS = ("lora", "norm", "head")
OPTIMIZERS = ("adamw", "adamw8bit", "paged_adamw8bit")
_EXACT = ("recompress", "residual", "stack")
# Clients find their factors in the same coordinates in every round.
_STABLE = ("fedavg", "zeropad", "ffa", "core")
# The server needs sums of updates only.
_LINEAR = ("ffa", "alternate", "core")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

_CHOICES: Mapping[str, tuple[str, ...]] = {
    "task": ("causal-lm", "sequence-classification"),
    "strategy.name": ("recompress", "residual", "stack", "fedavg", "zeropad", "flexlora", "ffa", "alternate", "core"),
    "partition.kind": ("natural", "dirichlet", "iid", "shards"),
    "train.schedule": ("constant", "cosine"),
    "train.precision": ("auto", "fp32", "bf16"),
    "train.device": ("auto", "cpu", "cuda", "mps", "xpu"),
    "aggregation.weights": ("auto", "num_examples", "nominal", "uniform", "contributors"),
    "wire.format": ("fp32", "bf16", "fp16", "int8"),
    "evaluate.split": ("test", "tune"),
    "data.loss_on": ("auto", "response", "all"),
    "engine": ("sequential",),
    "adapter.kind": KINDS,
    "lora.allocation": ("uniform", "importance"),
    "train.optimizer": ("auto", *OPTIMIZERS),
    "quantisation.compute": ("auto", "fp32", "bf16", "fp16"),
    "privacy.mode": ("none", "example-dp", "client-dp"),
    "privacy.unit": ("record", "user"),
}

# Key -> (lowest, highest, whether the lowest itself is allowed).
_RANGES: Mapping[str, tuple[float, float, bool]] = {
    "rounds": (1, 1_000_000, True),
    "clients.count": (1, 1_000_000, True),
    "clients.fraction": (0, 1, False),
    "clients.dropout_rate": (0, 1, True),
    "clients.quorum": (1, 1_000_000, True),
    "clients.over_selection": (0, 10, True),
    "clients.carry_rounds": (0, 1_000_000, True),
    "clients.start": (1, 1_000_000, True),
    "clients.deadline_s": (0, 1e9, False),
    "clients.patience_s": (0, 1e9, False),
    "lora.rank": (1, 1_000_000, True),
    "wire.chunk_bytes": (1024, 16 * 1024**2, True),
    "wire.heartbeat_s": (0.05, 3600, True),
    "quantisation.bits": (4.2, 32, True),
    "quantisation.compensation": (0, 1_000_000, True),
    "evaluate.deadline_s": (0, 1e9, False),
    "coordinator.linger_s": (0, 1e7, True),
    "coordinator.uploads": (1, 10_000, True),
    "coordinator.drain_s": (0, 86_400, True),
    "client.give_up_s": (0, 1e9, True),
    "clients.download_rank": (1, 1_000_000, True),
    "partition.dirichlet_alpha": (0, math.inf, False),
    "partition.shards_per_client": (1, 1_000_000, True),
    "partition.min_examples": (1, math.inf, True),
    "train.local_steps": (1, 1_000_000_000, True),
    "train.batch_size": (1, 1_000_000, True),
    "train.accumulation": (1, 1_000_000, True),
    "train.micro_batch": (1, 1_000_000, True),
    "train.max_length": (2, 10_000_000, True),
    "train.learning_rate": (0, math.inf, True),
    "train.warmup_steps": (0, math.inf, True),
    "train.final_learning_rate": (0, 1, True),
    "train.weight_decay": (0, math.inf, True),
    "train.max_grad_norm": (0, math.inf, True),
    "train.proximal": (0, math.inf, True),
    "lora.lora_alpha": (0, math.inf, False),
    "aggregation.rank_cap": (1, math.inf, True),
    "aggregation.full_weight": (1, math.inf, True),
    "aggregation.learning_rate": (0, math.inf, False),
    "aggregation.max_norm": (0, math.inf, False),
    "evaluate.every": (1, math.inf, True),
    "evaluate.max_examples": (1, math.inf, True),
    "evaluate.batch_size": (1, math.inf, True),
    "data.generate": (0, 1000, True),
    "privacy.secagg_range": (0, 1e6, False),
    "privacy.secagg_wait_s": (0, 1e6, False),
    "checkpoints": (1, math.inf, True),
    "threads": (0, 4096, True),
    "privacy.epsilon": (0, 64, False),
    "privacy.delta": (0, 0.5, False),
    "privacy.noise_multiplier": (0, 1e5, False),
    "privacy.clip_norm": (0, math.inf, False),
    "privacy.user_rows": (1, 1_000_000, True),
    "seed": (0, 2**62, True),
}


def per_client(value: Any, count: int, key: str) -> list[int]:
    """One positive integer a client, from a single value or a list.

    Args:
        value: An int, or a sequence of ints.
        count: Number of clients.
        key: The config key, for messages.

    Returns:
        `count` integers.

    Raises:
        ConfigError: If the list has another length, or an entry is no integer >= 1.
    """
    listed = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value] * count
    if len(listed) != count:
        raise ConfigError(
            f"{key}: expected one entry for each of {count} clients or a single value, got {len(listed)} entries. "
            f"Set clients.count={len(listed)}, or give {count} entries."
        )
    for index, entry in enumerate(listed):
        if isinstance(entry, bool) or not isinstance(entry, int) or entry < 1:
            raise ConfigError(f"{key}: expected integers >= 1, got {entry!r} for client {index}.")
    return listed


def checked(config: Config) -> Config:
    """The config itself, if every value is possible and every asked feature exists.

    Args:
        config: A composed config.

    Returns:
        The same object.

    Raises:
        ConfigError: Naming all keys that are wrong, what was expected and what to set.
    """
    wrong: list[str] = []
    for key, choices in _CHOICES.items():
        value = value_of(config, key)
        if value not in choices:
            wrong.append(f"{key}={value}: expected one of {', '.join(choices)}.{nearest(str(value), choices)}")
    for key, (low, high, closed) in _RANGES.items():
        value = value_of(config, key)
        if value is None:
            continue
        if not (low <= value <= high) or (value == low and not closed) or not math.isfinite(value):
            bracket = "[" if closed else "("
            wrong.append(f"{key}={value}: expected a number in {bracket}{low:g}, {high:g}].")
    for name in config.baselines:
        if name not in ("base", "local", "central"):
            wrong.append(f"baselines: expected any of base, local, central, got {name!r}.")
    if config.clients.dropout_rate >= 1:
        wrong.append("clients.dropout_rate: expected less than 1, or nobody would ever answer.")
    if wrong:
        raise ConfigError("\n".join(wrong))
    _check_together(config)
    return config


def _check_together(config: Config) -> None:
    """Raise for values that are possible alone and not together."""
    clients = config.clients
    ranks = per_client(clients.ranks, clients.count, "clients.ranks")
    per_client(clients.join_round, clients.count, "clients.join_round")
    factors = config.adapter.kind == "lora"
    if config.strategy.name == "fedavg" and len(set(ranks)) > 1 and factors:
        raise ConfigError(
            f"strategy=fedavg averages factors and needs one rank, got clients.ranks={ranks}. "
            "Set clients.ranks to one value, or strategy=recompress, which is exact for unequal ranks."
        )
    _check_kind(config)
    _check_allocation(config)
    if not config.client.coordinator:  # else the batch is the run's, which the site learns from the terms
        check_micro_batch(config)
    if config.train.keep_optimizer and config.strategy.name not in _STABLE and factors:
        why = "trains another factor" if config.strategy.name == "alternate" else "factorises anew"
        raise ConfigError(
            f"train.keep_optimizer=true: {config.strategy.name} {why} each round, so the kept moments would "
            f"belong to other coordinates. Set train.keep_optimizer=false, or strategy to one of {', '.join(_STABLE)}."
        )
    if config.strategy.name == "alternate" and clients.carry_rounds:
        raise ConfigError(
            f"clients.carry_rounds={clients.carry_rounds}: expected 0 with strategy=alternate, whose next round trains the "
            "other factor: a straggler's change would meet one that it was not trained with. Set it to 0, or strategy=ffa."
        )
    if config.train.keep_optimizer and config.train.optimizer not in ("auto", "adamw"):
        raise ConfigError(
            f"train.keep_optimizer=true: expected train.optimizer=adamw, got {config.train.optimizer}, whose state is not "
            "carried from round to round. Set train.optimizer=adamw or auto."
        )
    if bool(config.data.prompt_column) != bool(config.data.response_column):
        raise ConfigError(
            "data.prompt_column and data.response_column: expected both or neither. Set the other one too."
        )
    if config.data.messages_column and config.data.prompt_column:
        raise ConfigError("data.messages_column and data.prompt_column: expected one of them. Unset the other.")
    if config.lora.use_rslora and config.lora.lora_alpha is None:
        raise ConfigError(
            "lora.use_rslora=true: expected lora.lora_alpha, the scale is lora_alpha / sqrt(rank). Set it."
        )
    targets = config.lora.target_modules
    listed = [targets] if isinstance(targets, str) else list(targets) if isinstance(targets, Sequence) else [None]
    if not listed or not all(isinstance(one, str) and one for one in listed):
        raise ConfigError(f"lora.target_modules={targets!r}: expected all-linear, or a list of module-name suffixes.")
    if clients.names and (len(set(clients.names)) != len(clients.names) or len(clients.names) != clients.count):
        raise ConfigError(
            f"clients.names: expected {clients.count} different names, one a client, got {len(clients.names)} "
            f"({len(set(clients.names))} different). Set clients.count={len(set(clients.names))}, or name every client."
        )
    for name in clients.names:
        if _NAME.fullmatch(name) is None:
            raise ConfigError(
                f"clients.names: expected letters, digits and . _ - only, at most 64, as in a certificate, got {name!r}."
            )
    _check_quorum(config)
    _check_mode(config)
    _check_secagg(config)
    formats_of(config)
    if not isinstance(config.lora.rank_pattern, Mapping):
        raise ConfigError(
            f"lora.rank_pattern: expected a mapping of module suffix to rank, got {config.lora.rank_pattern!r}."
        )
    for suffix, rank in config.lora.rank_pattern.items():
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 0:
            raise ConfigError(f"lora.rank_pattern.{suffix}: expected an integer >= 0, got {rank!r}.")
    _holdout(config.data.holdout)


def check_micro_batch(config: Config) -> None:
    """Raise unless the micro-batch divides the batch.

    Args:
        config: With both.

    Raises:
        ConfigError: If it does not.
    """
    micro = config.train.micro_batch
    if micro is not None and config.train.batch_size % micro:
        raise ConfigError(
            f"train.micro_batch={micro}: expected a divisor of train.batch_size={config.train.batch_size}, so that the batch "
            "stays what the experiment asks. Set one, or leave it out."
        )


def _check_kind(config: Config) -> None:
    kind, task = config.adapter.kind, config.task
    if kind == "head" and task != "sequence-classification":
        raise ConfigError(
            f"adapter.kind=head: expected task=sequence-classification, got task={task}, whose output head is as large as its "
            "vocabulary. Set adapter.kind=norm or lora."
        )
    for key, value, usual in (
        ("lora.allocation", config.lora.allocation, "uniform"),
        ("lora.rank_pattern", config.lora.rank_pattern, {}),
    ):
        if kind != "lora" and value != usual:
            raise ConfigError(
                f"{key}={value}: expected {usual} with adapter.kind={kind}, which has no ranks. Leave it out, or set "
                "adapter.kind=lora."
            )


def _check_allocation(config: Config) -> None:
    if config.lora.allocation != "importance":
        return
    if config.strategy.name not in _EXACT:
        raise ConfigError(
            f"lora.allocation=importance: expected a strategy that is exact for unequal ranks, {', '.join(_EXACT)}, got "
            f"strategy={config.strategy.name}. Set one of them, or lora.allocation=uniform."
        )


def formats_of(config: Config) -> list[str]:
    """The number format of each client's base, in the order of `clients.ranks`.

    Args:
        config: With `quantisation.format`, one value or a list.

    Returns:
        `auto`, or one of `FORMATS`, a client.

    Raises:
        ConfigError: If one is unknown, or there are more or fewer than clients.
    """
    value, count = config.quantisation.format, config.clients.count
    listed = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value] * count
    if len(listed) != count:
        raise ConfigError(
            f"quantisation.format: expected one entry for each of {count} clients or a single value, got {len(listed)}."
        )
    for one in listed:
        if one not in ("auto", *FORMATS):
            hint = nearest(str(one), FORMATS)
            raise ConfigError(f"quantisation.format={one}: expected one of auto, {', '.join(FORMATS)}.{hint}")
    return listed


def _check_quorum(config: Config) -> None:
    clients = config.clients
    if clients.quorum > clients.count:
        raise ConfigError(f"clients.quorum={clients.quorum}: expected at most clients.count={clients.count}.")
    asked = max(1, round(clients.count * min(1.0, clients.fraction * (1 + clients.over_selection))))
    if clients.quorum > asked:
        raise ConfigError(
            f"clients.quorum={clients.quorum}: expected at most {asked}, the clients that a round asks with "
            f"clients.fraction={clients.fraction:g}. Raise clients.fraction or clients.over_selection, or lower the quorum."
        )
    if clients.start is not None and clients.quorum > clients.start:
        raise ConfigError(
            f"clients.start={clients.start}: expected at least clients.quorum={clients.quorum}, or the first round could "
            "not count. Raise it, or lower the quorum."
        )


def _check_mode(config: Config) -> None:
    """Raise for a budget or a noise that no mode keeps: the run would look private and not be."""
    if config.privacy.mode != "none":
        return
    for name in ("epsilon", "noise_multiplier"):
        given = getattr(config.privacy, name)
        if given is not None:
            raise ConfigError(
                f"privacy.{name}={given:g}: expected privacy.mode=example-dp or client-dp beside it, got privacy.mode=none, "
                f"which adds no noise. Set privacy=example-dp, or leave privacy.{name} out."
            )


def _check_secagg(config: Config) -> None:
    """Raise for whatever needs to see a single update, or lets one be told from two sums."""
    if not config.privacy.secagg:
        return
    clients, aggregation = config.clients, config.aggregation
    asked = max(1, round(clients.count * clients.fraction))
    refusals = [
        (
            config.strategy.name not in _LINEAR,
            f"strategy={config.strategy.name} needs each update by itself, a secure sum gives their sum. Set strategy to one "
            f"of {', '.join(_LINEAR)}",
        ),
        (
            asked < 3,
            f"a round asks {asked} of clients.count={clients.count}, and of two each learns the other's update by subtracting "
            "its own. Have at least 3 asked",
        ),
        (
            clients.carry_rounds > 0,
            f"clients.carry_rounds={clients.carry_rounds}: masks are bound to one round's clients. Set it to 0",
        ),
        (
            clients.over_selection > 0,
            f"clients.over_selection={clients.over_selection:g}: whoever is not waited for is in no sum. Set it to 0",
        ),
        (config.keep_updates, "keep_updates=true: nobody has single updates to keep. Set it to false"),
        (
            weighting_of(config) == "contributors",
            "aggregation.weights=contributors needs each module's contributors, which nobody sees. Set it to num_examples or "
            "uniform",
        ),
        (
            aggregation.max_norm is not None,
            "aggregation.max_norm needs the norm of each update, which nobody sees. Leave it out; privacy.secagg_range bounds "
            "each number",
        ),
    ]
    for wrong, why in refusals:
        if wrong:
            raise ConfigError(f"privacy.secagg=true: {why}, or set privacy.secagg=false.")


def _holdout(value: str) -> None:
    try:
        share = float(value)
    except ValueError:
        return  # a file
    if not 0 < share <= 0.4:
        raise ConfigError(f"data.holdout={value}: expected a share in (0, 0.4], or a file of test rows.")


def weighting_of(config: Config) -> str:
    """By what updates are weighted.

    Args:
        config: With privacy.mode and aggregation.weights.

    Returns:
        `num_examples` (under `nominal` the public number that a client declares), `uniform` or `contributors`.
    """
    chosen = config.aggregation.weights
    if chosen == "auto":
        chosen = {"example-dp": "nominal", "client-dp": "uniform"}.get(config.privacy.mode, "num_examples")
    return "num_examples" if chosen == "nominal" else chosen


def nominal_of(config: Config) -> list[int | None]:
    """The public number of examples of each client of a simulation, in the order of `clients.ranks`.

    Args:
        config: With `privacy.nominal_examples`, one value, a list or none.

    Returns:
        A number a client, None where none is declared.

    Raises:
        ConfigError: If the list has another length, or an entry is no integer >= 1.
    """
    declared = config.privacy.nominal_examples
    if declared is None:
        return [None] * config.clients.count
    return list(per_client(declared, config.clients.count, "privacy.nominal_examples"))


def client_names(config: Config) -> list[str]:
    """The clients' ids, in the order of `clients.ranks`.

    Args:
        config: A checked config.

    Returns:
        `clients.names`, or 0, 1, 2 and so on.
    """
    return list(config.clients.names) or [str(index) for index in range(config.clients.count)]
