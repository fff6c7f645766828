"""The configuration tree, one for every way to run. Leaves are scalars and lists; a comment says what each means.

Hydra composes overrides on this tree, so the dotted keys on the command line and in YAML are the same. The classes are not
frozen, because OmegaConf could then not compose them; nothing changes a config after `checked`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

# Below what a coordinator decides for its sites, and still each site's own.
SITE_KEYS = (
    "train.device", "train.micro_batch", "train.checkpointing", "train.optimizer", "lora.rank", "lora.public_data",
    "privacy.nominal_examples",
)  # fmt: skip
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

    name: str = _doc("recompress", "recompress, residual, stack, ffa, alternate, core, fedavg, zeropad or flexlora")


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
    dropout_rate: float = _doc(0.0, "simulation: chance that a client asked in a round does not answer")
    quorum: int = _doc(1, "fewest accepted updates for a round to count")
    names: list[str] = _doc([], "names of the clients, in the order of clients.ranks; default 0, 1, 2 and so on")
    over_selection: float = _doc(0.0, "deployment: further share asked, so that the slowest need not be waited for")
    carry_rounds: int = _doc(0, "deployment: rounds for which a straggler's update still counts; 0 drops it")
    start: int | None = _doc(None, "deployment: clients to wait for before the first round; default clients.count")
    deadline_s: float = _doc(3600.0, "deployment: longest wait for clients to come, and for a round's updates")
    patience_s: float = _doc(600.0, "deployment: a client that was silent for longer is not asked")


@dataclass
class TrainConfig:
    """Local training."""

    local_steps: int = _doc(20, "optimizer steps a round")
    batch_size: int = _doc(8, "examples of a batch")
    accumulation: int = _doc(1, "batches in an optimizer step")
    micro_batch: int | None = _doc(
        None, "at a client: examples in one forward pass, a divisor of batch_size; default: its plan's"
    )
    checkpointing: bool | None = _doc(
        None, "at a client: compute activations again in the backward pass; default: its plan's"
    )
    optimizer: str = _doc("auto", "at a client: auto (its plan's), adamw, adamw8bit or paged_adamw8bit")
    max_length: int = _doc(128, "tokens in an example")
    learning_rate: float = _doc(5e-3, "peak, AdamW")
    schedule: str = _doc("cosine", "constant or cosine, over the whole campaign")
    warmup_steps: int = _doc(0, "linear warm-up, in optimizer steps of the campaign")
    final_learning_rate: float = _doc(0.1, "end of the cosine, as a share of the peak")
    weight_decay: float = _doc(0.0, "AdamW's")
    max_grad_norm: float = _doc(1.0, "gradient clipping of a step; 0 is off")
    proximal: float = _doc(0.0, "FedProx mu, on the distance of products from the release")
    keep_optimizer: bool = _doc(
        False, "carry each client's optimizer over rounds; needs stable coordinates (ffa, core, fedavg, zeropad)"
    )
    precision: str = _doc("auto", "auto (bf16 autocast where the device has it, fp32 on a CPU), fp32 or bf16")
    device: str = _doc("auto", "auto, cpu, cuda, mps, xpu")


@dataclass
class LoraConfig:
    """The adapter's shape."""

    rank: int | None = _doc(
        None,
        "deployment, at a client: the rank that it trains; default: the most of what it is offered that it can hold",
    )
    target_modules: Any = _doc("all-linear", "module-name suffixes as a list, or all-linear")
    lora_alpha: float | None = _doc(None, "scale is lora_alpha / rank; default: 2 x the client's rank, so scale 2")
    use_rslora: bool = _doc(False, "scale is lora_alpha / sqrt(rank)")
    rank_pattern: Any = _doc({}, "module-name suffix -> largest rank there; 0 leaves those modules untrained")
    allocation: str = _doc(
        "uniform", "uniform, or importance: a client's rank goes to the modules that matter on its data"
    )
    public_data: str = _doc("", "at a client: text to score importance on instead of its own; needed under privacy")


@dataclass
class AdapterConfig:
    """What is trained."""

    kind: str = _doc(
        "lora",
        "lora, norm (scale and shift of every norm; of a classifier its head, too), or head (of a classifier, alone)",
    )


@dataclass
class QuantisationConfig:
    """The base's number format at the clients; at a site its own choice, which stays there."""

    format: Any = _doc(
        "auto",
        "auto (the site's plan; fp32 in a simulation), fp32, bf16, nf4, int8, mixed, int8wo or fp8wo; in a simulation "
        "also one entry a client",
    )
    compute: str = _doc("auto", "of activations and whatever is not quantised: auto (by device), fp32, bf16 or fp16")
    bits: float = _doc(5.0, "bits a weight that format mixed may spend, at least 4.2")
    compensation: int = _doc(
        0, "rank of what a client adds to its base for what quantising it on loading loses; 0 is off"
    )


@dataclass
class AggregationConfig:
    """How updates become the next global adapter."""

    rank_cap: int | None = _doc(
        None, "recompress keeps this many singular values; default: 2 x the largest client rank"
    )
    weights: str = _doc(
        "auto",
        "auto (num_examples; under example-dp nominal, under client-dp uniform), num_examples, nominal (by the public "
        "privacy.nominal_examples), uniform, or contributors (by num_examples, renormalised by layer)",
    )
    full_weight: int | None = _doc(
        None,
        "examples at which a client has full weight, where weights are capped, as by client-dp and privacy.secagg; below it has "
        "less; default under secagg in a simulation: the most that a client has",
    )
    learning_rate: float = _doc(1.0, "server's step on the mean change")
    max_norm: float | None = _doc(
        None, "an update whose change, over all modules, has a larger norm is refused; default: 1e6 a module"
    )


@dataclass
class WireConfig:
    """The number format of what travels."""

    format: str = _doc("fp32", "fp32, bf16, fp16 or int8")
    chunk_bytes: int = _doc(1024**2, "deployment: bytes of an adapter in one message")
    heartbeat_s: float = _doc(10.0, "deployment: seconds between a client's signs of life")


@dataclass
class EvaluateConfig:
    """Held-out evaluation."""

    split: str = _doc("test", "test or tune")
    every: int = _doc(1, "rounds between evaluations; the last round is always evaluated")
    max_examples: int | None = _doc(None, "at most this many held-out examples a client")
    batch_size: int = _doc(32, "examples in a forward pass")
    deadline_s: float = _doc(600.0, "deployment: longest wait for the clients' figures")


@dataclass
class PrivacyConfig:
    """Differential privacy."""

    mode: str = _doc(
        "none",
        "none, example-dp (each client adds noise to its own steps) or client-dp (a trusted coordinator adds it)",
    )
    epsilon: float | None = _doc(None, "budget of the whole campaign, for each client")
    delta: float = _doc(1e-5, "the delta of (epsilon, delta); below 1 / nominal_examples")
    unit: str = _doc(
        "record", "example-dp: what one unit is, a record, or a user with all its records (data.user_column)"
    )
    noise_multiplier: float | None = _doc(None, "noise by hand, in units of the clipping norm; default: by epsilon")
    clip_norm: float = _doc(1.0, "client-dp: largest L2 norm of a client's change (example-dp: train.max_grad_norm)")
    user_rows: int = _doc(8, "unit=user: most rows of one user in a step")
    secagg: bool = _doc(False, "secure aggregation: the coordinator sees sums of updates only (ffa, alternate, core)")
    secagg_range: float = _doc(
        1.0, "secure aggregation: largest change of a number in a round; a larger one is refused"
    )
    secagg_wait_s: float = _doc(300.0, "deployment: longest wait for each step of a secure sum")
    nominal_examples: Any = _doc(
        None,
        "public number of examples (unit=user: of users) that a site declares; in a simulation also one entry a client, "
        "default: the silos' own numbers",
    )
    force: bool = _doc(False, "client-dp: run although the noise drowns the signal")


@dataclass
class CoordinatorConfig:
    """The coordinator's side of a deployment."""

    listen: str = _doc("127.0.0.1:8443", "host:port, the one port that is open; 0.0.0.0:8443 for every interface")
    spec: str = _doc("", "the schema file that `lamina spec MODEL` writes")
    identity: str = _doc("", "folder with the coordinator's certificate and keys, from `lamina pki enroll`")
    revocations: str = _doc("", "the consortium's crl.pem, read again when it changes; default: crl.pem in identity")
    metrics: str = _doc("", "host:port of a Prometheus endpoint, without TLS; unset is off")
    uploads: int = _doc(8, "uploads that are written at one time, beside slow ones; others wait")
    linger_s: float = _doc(0.0, "after the end, seconds in which operators can still fetch")
    drain_s: float = _doc(30.0, "on SIGTERM, longest wait for uploads that are under way")


@dataclass
class ClientConfig:
    """A site's side of a deployment."""

    coordinator: str = _doc("", "host:port of the coordinator")
    identity: str = _doc("", "folder with the site's certificate and keys, from `lamina pki enroll`")
    name: str = _doc("", "with insecure=true only: the client's name; otherwise the certificate says it")
    revocations: str = _doc("", "the consortium's crl.pem, against a revoked coordinator; default: crl.pem in identity")
    policy: str = _doc("", "the site's policy file; what it does not allow is refused here")
    memory: str = _doc("", "the most that training may take beside the imports, such as 4GiB; default: what is free")
    state: str = _doc("lamina-site", "folder for the last update and whatever else must outlive a restart")
    stay: bool = _doc(False, "wait for the next run when one is finished")
    give_up_s: float | None = _doc(None, "end when the coordinator was out of reach for so long; default: never")


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
    coordinator: CoordinatorConfig = field(default_factory=CoordinatorConfig)
    client: ClientConfig = field(default_factory=ClientConfig)
    insecure: bool = _doc(False, "deployment without certificates, on the loopback interface only")
    engine: str = _doc("sequential", "sequential: one frozen base in this process")
    baselines: list[str] = _doc([], "any of base, local, central, measured in the same run")
    keep_updates: bool = _doc(False, "keep every decoded update and release, for audits")
    checkpoints: int = _doc(2, "how many rounds' checkpoints are kept")
    seed: int = _doc(0, "of sampling, batches, initialisation")
    threads: int = _doc(0, "CPU threads; 0 leaves the default")
    output: str = _doc("", "run directory; a simulation's default: outputs/<date>/<time>")
    resume: str = _doc("", "run directory to continue")


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
