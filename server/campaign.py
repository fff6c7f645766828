"""From a config and a spec to the fixed values of a run: budgets, strategy, campaign, and the run's name."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lamina.protos.codec import WireFormat
from lamina.protos.config import Config, client_names, known_keys, per_client, value_of, weighting_of
from lamina.protos.errors import ConfigError
from lamina.protos.files import sha256
from lamina.protos.messages import Budget
from lamina.protos.privacy.noise import Stream, secret
from lamina.protos.ranks import SPREAD, check, ends_so, uniform
from lamina.protos.secagg.context import LEAST
from lamina.protos.secagg.coordinates import Rule
from lamina.protos.spec import AdapterSpec
from lamina.server import privacy
from lamina.server.spending import Promise, promise_of
from lamina.strategies import Options, Strategy, build


def secret_streams(purpose: str, round_number: int) -> Stream:
    """Randomness that nobody can foretell, whatever for."""
    return secret()


@dataclass(frozen=True)
class Campaign:
    """What is fixed over a run.

    Attributes:
        run_id: Its name.
        spec: The negotiated schema.
        strategy: The aggregation method.
        budgets: Client id -> what it can hold, of clients that are known before the run.
        joined: Client id -> first round.
        rounds: How many.
        fraction: Share of clients asked a round.
        over_selection: Further share asked, so that the slowest need not be waited for.
        quorum: Fewest accepted updates.
        wire: Number format of releases.
        weighting: See `strategies.base.client_weights`.
        seed: Of selection and rounding.
        deadline_s: Longest wait for a round's replies, or None.
        carry_rounds: Rounds for which a straggler's update still counts; 0 drops it.
        max_norm: See `admission.Expected`.
        plan: What client-dp is in the run, or None.
        streams: Where the coordinator's private randomness comes from.
        masking: How changes are weighed and encoded where only their sum is seen, or None.
        wait_s: Longest wait for a step of such a sum.
        promise: Of privacy, or None.
    """

    run_id: str
    spec: AdapterSpec
    strategy: Strategy
    budgets: Mapping[str, Budget]
    joined: Mapping[str, int]
    rounds: int
    fraction: float = 1.0
    over_selection: float = 0.0
    quorum: int = 1
    wire: WireFormat = "fp32"
    weighting: Any = "num_examples"
    seed: int = 0
    deadline_s: float | None = None
    carry_rounds: int = 0
    max_norm: float | None = None
    plan: privacy.Plan | None = None
    streams: privacy.Streams = secret_streams
    masking: Rule | None = None
    wait_s: float | None = None
    promise: Promise | None = None

    def present(self, round_number: int) -> Mapping[str, Budget]:
        """The clients that have joined by a round, where all were known before the run."""
        return {client: self.budgets[client] for client, first in self.joined.items() if first <= round_number}


# Settings that may differ when a run is resumed: they do not change a bit of it.
FREE_KEYS = (
    "output", "resume", "threads", "checkpoints", "keep_updates", "baselines", "data.generate", "insecure",
    "clients.quorum", "clients.start", "clients.deadline_s", "clients.patience_s", "evaluate.deadline_s",
    "wire.chunk_bytes", "wire.heartbeat_s", "lora.rank", "privacy.secagg_wait_s",
)  # fmt: skip
FREE_SECTIONS = ("coordinator.", "client.")


def budgets(
    config: Config, spec: AdapterSpec, chosen: Mapping[str, Mapping[str, int]] | None = None
) -> dict[str, Budget]:
    """What each client can hold: its rank clamped per module, its scale, its download rank.

    Args:
        config: Ranks, lora_alpha, rank pattern.
        spec: Module shapes.
        chosen: Client id -> ranks by module, of clients that have chosen them.

    Returns:
        Client id -> budget.

    Raises:
        ConfigError: If a rank pattern names no module, or leaves nothing to train, or a client chose too much.
    """
    for suffix in config.lora.rank_pattern:
        if not any(ends_so(module, suffix) for module in spec.modules):
            known = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in spec.modules}))
            raise ConfigError(f"lora.rank_pattern.{suffix}: no adapted module ends so. Adapted: {known}.")
    ranks = per_client(config.clients.ranks, config.clients.count, "clients.ranks")
    return {
        name: budget(config, spec, rank, (chosen or {}).get(name))
        for name, rank in zip(client_names(config), ranks, strict=True)
    }


def budget(config: Config, spec: AdapterSpec, rank: int, chosen: Mapping[str, int] | None = None) -> Budget:
    """What a client of one rank can hold.

    Args:
        config: lora_alpha, rank pattern, download rank.
        spec: Module shapes.
        rank: The client's nominal rank.
        chosen: Ranks by module that the client asks for instead, or None.

    Returns:
        The budget.

    Raises:
        ConfigError: If the rank pattern leaves nothing to train, or the client asks for more than its rank gives.
    """
    ranks = per_client(config.clients.ranks, config.clients.count, "clients.ranks")
    largest = config.clients.download_rank or _spread(config) * _cohort_rank(config, ranks)
    train = uniform(spec, rank, config.lora.rank_pattern)
    if chosen is not None:
        check(spec, chosen, rank, config.lora.rank_pattern, config.lora.allocation)
        train = {module: chosen[module] for module in spec.modules if chosen.get(module)}
    if not train and not spec.dense:
        raise ConfigError("lora.rank_pattern: expected some module to train, every one has rank 0.")
    return Budget(
        train=train,
        download={module: spec.clamped(max(largest, train.get(module, 0)), module) for module in spec.modules},
        scale={module: scale(config, rank, train[module]) for module in train},
    )


def _cohort_rank(config: Config, ranks: Sequence[int]) -> int:
    """The sum of a cohort's ranks; under partial participation, of the largest that can meet."""
    size = max(1, round(config.clients.fraction * len(ranks)))
    return sum(sorted(ranks, reverse=True)[:size])


def _spread(config: Config) -> int:
    """How many times its nominal rank a client may have in one module."""
    return SPREAD if config.lora.allocation == "importance" else 1


def scale(config: Config, client_rank: int, rank: int) -> float:
    """The runtime scale of one module at one client.

    Args:
        config: lora_alpha and rsLoRA.
        client_rank: The client's nominal rank; without lora_alpha, lora_alpha is twice this and the scale 2.
        rank: The module's rank after clamping.

    Returns:
        lora_alpha / rank, or lora_alpha / sqrt(rank).
    """
    if config.lora.lora_alpha is None:
        return 2.0
    return float(config.lora.lora_alpha) / (rank**0.5 if config.lora.use_rslora else rank)


def campaign(
    config: Config,
    spec: AdapterSpec,
    found: Mapping[str, Budget],
    run_id: str,
    streams: privacy.Streams = secret_streams,
) -> Campaign:
    """The round loop's fixed values.

    Args:
        config: A checked config.
        spec: The schema.
        found: Client id -> budget.
        run_id: The run's name.
        streams: Where the coordinator's private randomness comes from; only a simulation's may be seeded.

    Returns:
        A campaign.

    Raises:
        ConfigError: If the strategy cannot use an option, or does not go with the privacy mode.
    """
    rank = {m: max((b.train.get(m, 0) for b in found.values()), default=0) for m in spec.modules}
    scales = {
        m: next((b.scale[m] for b in found.values() if b.train.get(m, 0) == rank[m] and rank[m]), 2.0) for m in rank
    }
    ranks = per_client(config.clients.ranks, config.clients.count, "clients.ranks")
    options = Options(
        rank=rank,
        scale=scales,
        rank_cap=config.aggregation.rank_cap or 2 * max(ranks) * _spread(config),
        weighting=weighting_of(config),  # type: ignore[arg-type]
        learning_rate=config.aggregation.learning_rate,
        seed=config.seed,
    )
    strategy, plan = build(config.strategy.name, options), None
    privacy.check(config, strategy)
    if config.privacy.mode == "client-dp":
        plan = privacy.planned(config, strategy, spec)
        strategy = privacy.under(plan, strategy, streams)
    joins = per_client(config.clients.join_round, config.clients.count, "clients.join_round")
    return Campaign(
        run_id=run_id,
        spec=spec,
        strategy=strategy,
        budgets=found,
        joined=dict(zip(client_names(config), joins, strict=True)),
        rounds=config.rounds,
        fraction=config.clients.fraction,
        over_selection=config.clients.over_selection,
        quorum=max(config.clients.quorum, LEAST if config.privacy.secagg else 1),
        wire=config.wire.format,  # type: ignore[arg-type]
        weighting=weighting_of(config),
        seed=config.seed,
        deadline_s=config.clients.deadline_s,
        carry_rounds=config.clients.carry_rounds,
        max_norm=config.aggregation.max_norm,
        plan=plan,
        streams=streams,
        masking=masking(config),
        wait_s=config.privacy.secagg_wait_s,
        promise=promise_of(config),
    )


def masking(config: Config) -> Rule | None:
    """How changes are weighed and encoded in secure sums.

    Args:
        config: A checked config.

    Returns:
        The rule, None without secure aggregation.

    Raises:
        ConfigError: If weights are asked for without the number that bounds them.
    """
    privacy = config.privacy
    if not privacy.secagg:
        return None
    if weighting_of(config) == "uniform":
        return Rule("uniform", 1, privacy.secagg_range)
    if config.aggregation.full_weight is None:
        raise ConfigError(
            "aggregation.full_weight: expected the public number of examples that gives a client full weight, as the sum of "
            "weights is all that is seen. Set it to what the largest site has, about, or aggregation.weights=uniform."
        )
    return Rule("num_examples", config.aggregation.full_weight, privacy.secagg_range)


def fixed_settings(config: Config, spec: AdapterSpec) -> dict[str, Any]:
    """What must be the same when a run is resumed.

    Args:
        config: The config.
        spec: For the base's hashes.

    Returns:
        Base hashes and every setting that changes a bit. `rounds` may grow under a constant schedule, unless the noise was
        calibrated for them: rounds that are done would have had too little for the budget of more.
    """
    keys = [key for key in known_keys() if key not in FREE_KEYS and not key.startswith(FREE_SECTIONS)]
    calibrated = config.privacy.mode != "none" and config.privacy.noise_multiplier is None
    if config.train.schedule == "constant" and not calibrated:
        keys.remove("rounds")
    fixed = {f"base {name} hash": value for name, value in spec.hashes.items()}
    fixed |= {key: value_of(config, key) for key in keys}
    return dict(json.loads(json.dumps(fixed)))


def run_id(fixed: Mapping[str, Any]) -> str:
    """A name that equal settings on equal data share.

    Args:
        fixed: See `identity`.

    Returns:
        12 hex digits.
    """
    return sha256(json.dumps(fixed, sort_keys=True, default=str).encode())[:12]
