"""The configuration tree, one for every way to run. Leaves are scalars and lists; a comment says what each means.

Hydra composes overrides on this tree, so the dotted keys on the command line and in YAML are the same. The classes are not
frozen, because OmegaConf could then not compose them; nothing changes a config after `checked`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

from lamina.protos.errors import ConfigError, nearest

SHORTHANDS: Mapping[str, str] = {
    "data": "data.source",
    "model": "model.source",
    "strategy": "strategy.name",
    "partition": "partition.kind",
    "privacy": "privacy.mode",
    "quantisation": "quantisation.format",
}


def _doc(default: Any, text: str) -> Any:
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})


@dataclass
class DataConfig:
    """Where the text comes from and how a row becomes an example."""

    source: str = _doc("stdlib", "stdlib, a local jsonl/csv/parquet/txt file or directory, or a hub id")
    revision: str = _doc("", "commit of a hub data set")
    split: str = _doc("train", "split of a hub data set")
    text_column: str = _doc("text", "column of plain text; also the input of sequence-classification")
    prompt_column: str = _doc("", "column of prompts; with response_column, loss on the response only")
    response_column: str = _doc("", "column of responses")
    messages_column: str = _doc("", "column of chat messages (role, content), rendered by the tokenizer's template")
    label_column: str = _doc("label", "column of labels, for sequence-classification")
    labels: list[str] = _doc([], "ordered label list; empty takes the sorted labels of the whole training data")
    user_column: str = _doc("", "column of users inside a site; also the silos of partition=natural if set")
    template: str = _doc("{prompt}\n", "how a prompt is written before its response; {prompt} is the row's prompt")
    loss_on: str = _doc("auto", "auto (response where there is one), response, or all")
    holdout: str = _doc("0.1", "share of each silo kept for test and again for tune, or a file of test rows")
    generate: int = _doc(3, "how many held-out prompts to continue before and after, for the report")


@dataclass
class ModelConfig:
    """The frozen base."""

    source: str = _doc("tiny", "tiny, a local directory, or a hub id")
    revision: str = _doc("", "commit of a hub model; needed for hub ids")


@dataclass
class StrategyConfig:
    """The aggregation method."""

    name: str = _doc("recompress", "recompress, residual, stack, fedavg, zeropad or flexlora")


@dataclass
class PartitionConfig:
    """How rows are dealt to clients."""

    kind: str = _doc("natural", "natural (one silo a client), dirichlet, iid or shards")
    dirichlet_alpha: float = _doc(0.3, "concentration of partition=dirichlet; small is skewed")
    column: str = _doc("", "column that names the silo (natural) or the class (dirichlet, shards)")
    shards_per_client: int = _doc(2, "of partition=shards")
    min_examples: int = _doc(2, "fewest training rows a client may have")


@dataclass
class ClientsConfig:
    """Who takes part, and what each can hold."""

    count: int = _doc(10, "number of clients")
    ranks: Any = _doc(8, "rank of every client, or a list with one entry a client")
    fraction: float = _doc(1.0, "share of the clients asked in a round")
    download_rank: int | None = _doc(None, "most ranks a client can receive; default: the sum of the cohort's ranks")
    join_round: Any = _doc(1, "first round of every client, or a list with one entry a client")
    dropout_rate: float = _doc(0.0, "chance that a client asked in a round does not answer")
    quorum: int = _doc(1, "fewest accepted updates for a round to count")


@dataclass
class TrainConfig:
    """Local training."""

    local_steps: int = _doc(20, "optimizer steps a round")
    batch_size: int = _doc(8, "examples in a forward pass")
    accumulation: int = _doc(1, "forward passes in an optimizer step")
    max_length: int = _doc(128, "tokens in an example")
    learning_rate: float = _doc(5e-3, "peak, AdamW")
    schedule: str = _doc("cosine", "constant or cosine, over the whole campaign")
    warmup_steps: int = _doc(0, "linear warm-up, in optimizer steps of the campaign")
    final_learning_rate: float = _doc(0.1, "end of the cosine, as a share of the peak")
    weight_decay: float = _doc(0.0, "AdamW's")
    max_grad_norm: float = _doc(1.0, "gradient clipping of a step; 0 is off")
    proximal: float = _doc(0.0, "FedProx mu, on the distance of products from the release")
    keep_optimizer: bool = _doc(
        False, "carry each client's optimizer over rounds; needs stable coordinates (fedavg, zeropad)"
    )
    precision: str = _doc("auto", "auto (bf16 autocast where the device has it, fp32 on a CPU), fp32 or bf16")
    device: str = _doc("auto", "auto, cpu, cuda, mps, xpu")


@dataclass
class LoraConfig:
    """The adapter's shape."""

    target_modules: Any = _doc("all-linear", "module-name suffixes as a list, or all-linear")
    lora_alpha: float | None = _doc(None, "scale is lora_alpha / rank; default: 2 x the client's rank, so scale 2")
    use_rslora: bool = _doc(False, "scale is lora_alpha / sqrt(rank)")
    rank_pattern: Any = _doc({}, "module-name suffix -> largest rank there; 0 leaves those modules untrained")
    allocation: str = _doc("uniform", "how a client's rank is spread over modules")


@dataclass
class AdapterConfig:
    """What is trained."""

    kind: str = _doc("lora", "lora")


@dataclass
class QuantisationConfig:
    """The base's number format at the clients."""

    format: str = _doc("fp32", "fp32")
    bits: float = _doc(32.0, "bit budget of mixed formats")


@dataclass
class AggregationConfig:
    """How updates become the next global adapter."""

    rank_cap: int | None = _doc(
        None, "recompress keeps this many singular values; default: 2 x the largest client rank"
    )
    weights: str = _doc("num_examples", "num_examples, uniform, or contributors (renormalised by layer)")
    learning_rate: float = _doc(1.0, "server's step on the mean change")


@dataclass
class WireConfig:
    """The number format of what travels."""

    format: str = _doc("fp32", "fp32, bf16, fp16 or int8")


@dataclass
class EvaluateConfig:
    """Held-out evaluation."""

    split: str = _doc("test", "test or tune")
    every: int = _doc(1, "rounds between evaluations; the last round is always evaluated")
    max_examples: int | None = _doc(None, "at most this many held-out examples a client")
    batch_size: int = _doc(32, "examples in a forward pass")


@dataclass
class PrivacyConfig:
    """Differential privacy."""

    mode: str = _doc("none", "none")
    epsilon: float | None = _doc(None, "budget")
    delta: float | None = _doc(None, "the delta of (epsilon, delta)")
    unit: str = _doc("record", "record or user")
    secagg: bool = _doc(False, "secure aggregation")
    nominal_examples: int | None = _doc(None, "public number of examples that a site declares")


@dataclass
class Config:
    """Everything about a run."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    task: str = _doc("causal-lm", "causal-lm or sequence-classification")
    strategy: StrategyConfig = field(default_factory=StrategyConfig)
    partition: PartitionConfig = field(default_factory=PartitionConfig)
    clients: ClientsConfig = field(default_factory=ClientsConfig)
    rounds: int = _doc(5, "federated rounds")
    train: TrainConfig = field(default_factory=TrainConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    quantisation: QuantisationConfig = field(default_factory=QuantisationConfig)
    aggregation: AggregationConfig = field(default_factory=AggregationConfig)
    wire: WireConfig = field(default_factory=WireConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)
    engine: str = _doc("sequential", "sequential: one frozen base in this process")
    baselines: list[str] = _doc([], "any of base, local, central, measured in the same run")
    keep_updates: bool = _doc(False, "keep every decoded update and release, for audits")
    checkpoints: int = _doc(2, "how many rounds' checkpoints are kept")
    seed: int = _doc(0, "of sampling, batches, initialisation")
    threads: int = _doc(0, "CPU threads; 0 leaves the default")
    output: str = _doc("", "run directory; default outputs/<date>/<time>")
    resume: str = _doc("", "run directory to continue")


_CHOICES: Mapping[str, tuple[str, ...]] = {
    "task": ("causal-lm", "sequence-classification"),
    "strategy.name": ("recompress", "residual", "stack", "fedavg", "zeropad", "flexlora"),
    "partition.kind": ("natural", "dirichlet", "iid", "shards"),
    "train.schedule": ("constant", "cosine"),
    "train.precision": ("auto", "fp32", "bf16"),
    "train.device": ("auto", "cpu", "cuda", "mps", "xpu"),
    "aggregation.weights": ("num_examples", "uniform", "contributors"),
    "wire.format": ("fp32", "bf16", "fp16", "int8"),
    "evaluate.split": ("test", "tune"),
    "data.loss_on": ("auto", "response", "all"),
    "engine": ("sequential",),
    "adapter.kind": ("lora",),
    "lora.allocation": ("uniform",),
    "quantisation.format": ("fp32",),
    "privacy.mode": ("none",),
    "privacy.unit": ("record", "user"),
}

# Key -> (lowest, highest, whether the lowest itself is allowed).
_RANGES: Mapping[str, tuple[float, float, bool]] = {
    "rounds": (1, 1_000_000, True),
    "clients.count": (1, 1_000_000, True),
    "clients.fraction": (0, 1, False),
    "clients.dropout_rate": (0, 1, True),
    "clients.quorum": (1, 1_000_000, True),
    "clients.download_rank": (1, 1_000_000, True),
    "partition.dirichlet_alpha": (0, math.inf, False),
    "partition.shards_per_client": (1, 1_000_000, True),
    "partition.min_examples": (1, math.inf, True),
    "train.local_steps": (1, 1_000_000_000, True),
    "train.batch_size": (1, 1_000_000, True),
    "train.accumulation": (1, 1_000_000, True),
    "train.max_length": (2, 10_000_000, True),
    "train.learning_rate": (0, math.inf, True),
    "train.warmup_steps": (0, math.inf, True),
    "train.final_learning_rate": (0, 1, True),
    "train.weight_decay": (0, math.inf, True),
    "train.max_grad_norm": (0, math.inf, True),
    "train.proximal": (0, math.inf, True),
    "lora.lora_alpha": (0, math.inf, False),
    "aggregation.rank_cap": (1, math.inf, True),
    "aggregation.learning_rate": (0, math.inf, False),
    "evaluate.every": (1, math.inf, True),
    "evaluate.max_examples": (1, math.inf, True),
    "evaluate.batch_size": (1, math.inf, True),
    "data.generate": (0, 1000, True),
    "checkpoints": (1, math.inf, True),
    "threads": (0, 4096, True),
    "seed": (0, 2**62, True),
}


def known_keys() -> dict[str, str]:
    """Every dotted key that a run understands, with its one-line help.

    Returns:
        Key -> help, in the order of the tree.
    """
    found: dict[str, str] = {}

    def walk(node: Any, path: str) -> None:
        for one in fields(node):
            value = getattr(node, one.name)
            if is_dataclass(value):
                walk(value, f"{path}{one.name}.")
            else:
                found[path + one.name] = one.metadata.get("help", "")

    walk(Config(), "")
    return found


def value_of(config: Config, key: str) -> Any:
    """The value behind a dotted key.

    Args:
        config: A config.
        key: Such as `train.local_steps`.

    Returns:
        The leaf.
    """
    node: Any = config
    for part in key.split("."):
        node = getattr(node, part)
    return node


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
    if config.strategy.name == "fedavg" and len(set(ranks)) > 1:
        raise ConfigError(
            f"strategy=fedavg averages factors and needs one rank, got clients.ranks={ranks}. "
            "Set clients.ranks to one value, or strategy=recompress, which is exact for unequal ranks."
        )
    if config.train.keep_optimizer and config.strategy.name not in ("fedavg", "zeropad"):
        raise ConfigError(
            f"train.keep_optimizer=true: {config.strategy.name} factorises anew each round, so the kept moments would "
            "belong to other coordinates. Set train.keep_optimizer=false, or strategy=fedavg or zeropad."
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
    if clients.quorum > clients.count:
        raise ConfigError(f"clients.quorum={clients.quorum}: expected at most clients.count={clients.count}.")
    if not isinstance(config.lora.rank_pattern, Mapping):
        raise ConfigError(
            f"lora.rank_pattern: expected a mapping of module suffix to rank, got {config.lora.rank_pattern!r}."
        )
    for suffix, rank in config.lora.rank_pattern.items():
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 0:
            raise ConfigError(f"lora.rank_pattern.{suffix}: expected an integer >= 0, got {rank!r}.")
    _holdout(config.data.holdout)


def _holdout(value: str) -> None:
    try:
        share = float(value)
    except ValueError:
        return  # a file
    if not 0 < share <= 0.4:
        raise ConfigError(f"data.holdout={value}: expected a share in (0, 0.4], or a file of test rows.")
