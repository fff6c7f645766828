"""The site's own policy: what a coordinator may ask of it, and what may leave. Read and enforced here, whoever asks.

Terms and instructions are the coordinator's word and may be hostile: what does not fit is refused before anything acts on it.
A policy cannot promise what a coordinator does with an update once it has it: `raw_updates_to_peers` and `min_clients` hold
against one that says what it does. Against one that lies, example-dp helps, for there the site adds the noise itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from lamina.client.terms import HASH, expected_got, malformed, number, whole
from lamina.protos.config import EvaluateConfig, TrainConfig
from lamina.protos.errors import ConfigError, PolicyRefused, nearest, shown

TASKS = ("causal-lm", "sequence-classification")
MODES = ("none", "client-dp", "example-dp")  # from the weakest for the site to the strongest
UNITS = ("record", "user")
RAW_STRATEGIES = ("stack",)  # show every update to every client, whatever view their terms claim
COUNTS = ("exact", "rounded", "hidden")


@dataclass(frozen=True)
class PrivacyFloor:
    """The least privacy under which the site trains.

    Attributes:
        mode_at_least: `none`, `client-dp` (a trusted coordinator adds the noise) or `example-dp` (the site does).
        unit_at_least: `record` or `user`; of example-dp, for under client-dp the unit is the whole client.
        max_epsilon: Largest epsilon of a run, or None for any.
        max_delta: Largest delta of a run, or None for any.
        secagg: Whether the coordinator may see sums of updates only; no update by itself leaves then.
        total_epsilon: Largest epsilon of all runs in the site's ledger together, or None for any. Only example-dp adds up.
        total_delta: The delta of that; None for max_delta.
    """

    mode_at_least: str = "none"
    unit_at_least: str = "record"
    max_epsilon: float | None = None
    max_delta: float | None = None
    secagg: bool = False
    total_epsilon: float | None = None
    total_delta: float | None = None


@dataclass(frozen=True)
class Leave:
    """What may leave the site beside the trained adapter.

    Attributes:
        metrics: Names of the training metrics that are sent; others stay.
        num_examples: `exact`, `rounded` to one significant digit, or `hidden`, which sends 1.
        evaluation: Whether the site measures releases on its held-out text and sends the sums.
        rank: `exact`, or `coarse`: each module's rounded down to a power of two. The adapter's shapes show it.
        allocation: Whether ranks that were chosen by what matters on the site's data may leave; otherwise one rank for all.
        format: `exact`, or `hidden`: whether the coordinator is told the number format of the site's base.
    """

    metrics: tuple[str, ...] = ("train_loss", "tokens", "seconds")
    num_examples: str = "exact"
    evaluation: bool = True
    rank: str = "exact"
    allocation: bool = True
    format: str = "exact"


@dataclass(frozen=True)
class Policy:
    """What a coordinator may ask. An empty list allows any.

    Attributes:
        coordinators: Names in the certificates of the coordinators to work for.
        consortium: The one whose terms are accepted, or None for that of the site's CA.
        base_hashes: SHA-256 of the weights of base models to train. The site's own base is compared in any case.
        manifests: SHA-256 of the manifests of quantised copies that the site trusts to say of which base they are.
        tasks: Tasks to train on.
        strategies: Aggregation strategies to take part in.
        raw_updates_to_peers: Whether every other site may see this site's update as it was sent, as under `stack`.
        max_rounds: Most rounds of a run.
        max_local_steps: Most forward and backward passes of a round: train.local_steps x train.accumulation.
        max_batch_tokens: Most tokens of a forward pass: examples of a batch x train.max_length.
        max_rank: Largest rank to train.
        max_bytes_down: Most bytes of a round's release.
        max_bytes_up: Most bytes of a round's update.
        min_clients: Fewest clients whose updates are mixed before anything is released.
        privacy: The privacy floor.
        leave: What may leave.
        source: The file, for messages.
    """

    coordinators: tuple[str, ...] = ()
    consortium: str | None = None
    base_hashes: tuple[str, ...] = ()
    manifests: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    strategies: tuple[str, ...] = ()
    raw_updates_to_peers: bool = True
    max_rounds: int = 10_000
    max_local_steps: int = 100_000
    max_batch_tokens: int = 1024**2
    max_rank: int = 1024
    max_bytes_down: int = 16 * 1024**3
    max_bytes_up: int = 16 * 1024**3
    min_clients: int = 1
    privacy: PrivacyFloor = field(default_factory=PrivacyFloor)
    leave: Leave = field(default_factory=Leave)
    source: str = field(default="the default policy", compare=False)


def read(path: Path | None) -> Policy:
    """Read a site's policy file.

    Args:
        path: YAML, or None for the default policy. A file that is named must be there: no typing error opens a site.

    Returns:
        The policy; what the file leaves out has its default.

    Raises:
        ConfigError: If the file is missing or no YAML, a key is unknown or double, or a value impossible.
    """
    if path is None:
        return Policy()
    try:
        tree = OmegaConf.to_container(OmegaConf.create(path.read_text(encoding="utf-8")), resolve=False)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "no UTF-8 text"
        raise ConfigError(f"{path}: expected the site's policy file, got: {reason}. Set client.policy to it.") from None
    except (YAMLError, OmegaConfBaseException, ValueError) as error:
        first = " ".join(str(error).split())[:200]
        raise ConfigError(f"{path}: expected YAML with every key once, got: {first}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected `key: value` lines, got a {type(tree).__name__}. See deploy/policy.yaml.")
    policy: Policy = _parsed(Policy, tree, str(path), "")
    floor = policy.privacy
    if floor.total_epsilon is not None and not 0 < (floor.total_delta or floor.max_delta or 0) < 1:
        raise ConfigError(
            f"{path}: privacy.total_epsilon: expected privacy.total_delta < 1 beside it, the delta of that epsilon, or "
            "privacy.max_delta. Set one, such as 1e-5."
        )
    return replace(policy, source=str(path))


def check_terms(policy: Policy, terms: Mapping[str, Any], coordinator_name: str | None) -> None:
    """Refuse terms that the policy does not allow, or that are not what terms are.

    Args:
        policy: The site's.
        terms: What the coordinator signed. Nothing about it is believed.
        coordinator_name: The name in its verified certificate, or None where there is none.

    Raises:
        PolicyRefused: Naming everything that is wrong.
    """
    wrong = list(malformed(terms))
    if not wrong:
        wrong = [*_strangers(policy, terms, coordinator_name), *_too_much(policy, terms), *_too_open(policy, terms)]
    if wrong:
        raise PolicyRefused("\n".join(wrong))


def check_instruction(policy: Policy, kind: str, round_number: int, num_bytes: int, last_round: int) -> None:
    """Refuse an instruction that the policy does not allow.

    Args:
        policy: The site's.
        kind: `train` or `evaluate`, as the coordinator says.
        round_number: As the coordinator says.
        num_bytes: Of the release, before it is fetched.
        last_round: The last in which this site has trained in the run, by its own record; 0 for none.

    Raises:
        PolicyRefused: Naming everything that is wrong.
    """
    wrong = []
    if kind not in ("train", "evaluate"):
        wrong.append(expected_got("instruction.kind", "train or evaluate", kind, "Update the older side."))
    if kind == "evaluate" and not policy.leave.evaluation:
        wrong.append(_refused(policy, "leave.evaluation", "no evaluation of releases", "one", "not to ask for one"))
    if not whole(round_number, 0 if kind == "evaluate" else 1):
        wrong.append(expected_got("instruction.round", "a round, from 1", round_number))
    elif round_number > policy.max_rounds:
        limit = f"at most {policy.max_rounds} rounds"
        wrong.append(_refused(policy, "max_rounds", limit, f"round {round_number}", "fewer rounds"))
    elif kind == "train" and round_number <= last_round:
        then = "Ask its operator; if it was restored from a copy, stop this agent and move the run's folder in client.state away."
        expected = f"one after {last_round}, which is trained, or that one from the same release"
        wrong.append(expected_got("instruction.round", expected, round_number, then))
    if not whole(num_bytes, 0):
        wrong.append(expected_got("instruction.num_bytes", "a number of bytes", num_bytes))
    elif num_bytes > policy.max_bytes_down:
        limit = f"a release of at most {policy.max_bytes_down} bytes"
        wrong.append(_refused(policy, "max_bytes_down", limit, shown(num_bytes), "a smaller clients.download_rank"))
    if wrong:
        raise PolicyRefused("\n".join(wrong))


def check_upload(policy: Policy, num_bytes: int) -> None:
    """Refuse to send more than the policy allows.

    Args:
        policy: The site's.
        num_bytes: Of the encoded update.

    Raises:
        PolicyRefused: If it is more than max_bytes_up.
    """
    if num_bytes > policy.max_bytes_up:
        limit = f"an update of at most {policy.max_bytes_up} bytes"
        raise PolicyRefused(_refused(policy, "max_bytes_up", limit, shown(num_bytes), "a shorter wire.format"))


def leaving(policy: Policy, metrics: Mapping[str, float], num_examples: int) -> tuple[dict[str, float], int]:
    """What of a round's figures may leave the site.

    Args:
        policy: The site's.
        metrics: What training measured.
        num_examples: Examples in the training set, at least 1.

    Returns:
        The metrics that are allowed, and the number of examples to claim: exact, rounded half up to one significant digit,
        or 1 where it is hidden, so that every such client has one weight.
    """
    kept = {name: value for name, value in metrics.items() if name in policy.leave.metrics}
    if policy.leave.num_examples == "hidden":
        return kept, 1
    if policy.leave.num_examples == "rounded":
        unit = 10 ** (len(str(num_examples)) - 1)
        return kept, (2 * num_examples + unit) // (2 * unit) * unit
    return kept, num_examples


# --- the file


_CHOICES: Mapping[str, tuple[str, ...]] = {
    "tasks": TASKS,
    "privacy.mode_at_least": MODES,
    "privacy.unit_at_least": UNITS,
    "leave.num_examples": COUNTS,
    "leave.rank": ("exact", "coarse"),
    "leave.format": ("exact", "hidden"),
}
_LOWEST: Mapping[str, int] = {"max_bytes_down": 0, "max_bytes_up": 0}


def _parsed(kind: Any, tree: Mapping[Any, Any], where: str, prefix: str) -> Any:
    known = {one.name: one for one in fields(kind) if one.name != "source"}
    values = {}
    for key, value in tree.items():
        if key not in known:
            listed = ", ".join(prefix + name for name in known)
            raise ConfigError(f"{where}: {prefix}{key}: no such key.{nearest(str(key), known)} Known: {listed}")
        default = getattr(kind(), key)
        if is_dataclass(default):
            if not isinstance(value, dict):
                raise ConfigError(
                    f"{where}: {key}: expected keys below it, got {shown(value)}. See deploy/policy.yaml."
                )
            values[key] = _parsed(type(default), value, where, f"{key}.")
        else:
            values[key] = _setting(f"{prefix}{key}", value, default, where)
    return kind(**values)


def _setting(key: str, value: Any, default: Any, where: str) -> Any:
    """One value of the policy file, of the type of its default; every epsilon and delta is a positive number."""
    choices = _CHOICES.get(key)
    expected, fits = "", False
    if isinstance(default, tuple):
        expected = "a list of names" + (f" among {', '.join(choices)}" if choices else "")
        fits = isinstance(value, list) and all(isinstance(one, str) and one for one in value)
        fits = fits and (choices is None or set(value) <= set(choices))
        if fits and key in ("base_hashes", "manifests"):
            value, expected = [one.lower() for one in value], "a list of SHA-256 hashes, 64 hex digits each"
            fits = all(HASH.fullmatch(one) for one in value)
        value = tuple(value) if fits else value
    elif isinstance(default, bool):
        expected, fits = "true or false", isinstance(value, bool)
    elif isinstance(default, int):
        lowest = _LOWEST.get(key, 1)
        expected, fits = f"a whole number >= {lowest}", whole(value, lowest)
    elif choices is not None:
        expected, fits = f"one of {', '.join(choices)}", value in choices
    elif key == "consortium":
        expected, fits = "a name", value is None or (isinstance(value, str) and value != "")
    else:
        expected, fits = "a number > 0", value is None or (number(value) and value > 0)
    if not fits:
        raise ConfigError(f"{where}: {key}: expected {expected}, got {shown(value)}. See deploy/policy.yaml.")
    return value


# --- what the coordinator says


def _refused(policy: Policy, key: str, expected: str, got: str, ask: str) -> str:
    return f"{policy.source}: {key}: expected {expected}, got {got}. Ask the coordinator for {ask}, or change {key}."


def _strangers(policy: Policy, terms: Mapping[str, Any], coordinator_name: str | None) -> Iterator[str]:
    """Who asks, and for what."""
    if policy.coordinators and coordinator_name not in policy.coordinators:
        got = "one without a certificate" if coordinator_name is None else shown(coordinator_name)
        yield _refused(policy, "coordinators", _among(policy.coordinators), got, "its certificate's name")
    if policy.consortium is not None and terms["consortium"] != policy.consortium:
        got = shown(terms["consortium"])
        yield _refused(policy, "consortium", shown(policy.consortium), got, "its consortium")
    if policy.base_hashes and terms["hashes"]["weights"] not in policy.base_hashes:
        got = terms["hashes"]["weights"]
        yield _refused(policy, "base_hashes", "the weights of a base that is listed", got, "its base model")
    task = terms["task"].get("task", "causal-lm")
    if task not in (policy.tasks or TASKS):
        yield _refused(policy, "tasks", _among(policy.tasks or TASKS), shown(task), "another task")
    if policy.strategies and terms["strategy"] not in policy.strategies:
        yield _refused(policy, "strategies", _among(policy.strategies), shown(terms["strategy"]), "another strategy")


def _too_much(policy: Policy, terms: Mapping[str, Any]) -> Iterator[str]:
    """More work than the site gives."""
    ranks = [terms["rank"], *terms["budget"]["train"].values()]
    for key, got, most in (("rounds", terms["rounds"], policy.max_rounds), ("rank", max(ranks), policy.max_rank)):
        if got > most:
            yield _refused(policy, f"max_{key}", f"{key} <= {most}", shown(got), f"a smaller {key}")
    _, schema_bytes = terms["spec"]
    if schema_bytes > policy.max_bytes_down:
        limit = f"a schema of at most {policy.max_bytes_down} bytes"
        yield _refused(policy, "max_bytes_down", limit, shown(schema_bytes), "a smaller schema")
    task, defaults = terms["task"], TrainConfig()
    steps = task.get("train.local_steps", defaults.local_steps)
    accumulation = task.get("train.accumulation", defaults.accumulation)
    if min(steps, accumulation) < 1 or steps * accumulation > policy.max_local_steps:
        limit = f"1 <= train.local_steps x train.accumulation <= {policy.max_local_steps}"
        yield _refused(policy, "max_local_steps", limit, f"{steps} x {accumulation}", "shorter rounds")
    length = task.get("train.max_length", defaults.max_length)
    batches = {"train": defaults.batch_size, "evaluate": EvaluateConfig().batch_size}
    for part, default in batches.items():
        batch = task.get(f"{part}.batch_size", default)
        if min(batch, length) < 1 or batch * length > policy.max_batch_tokens:
            limit = f"1 <= {part}.batch_size x train.max_length <= {policy.max_batch_tokens}"
            yield _refused(policy, "max_batch_tokens", limit, f"{batch} x {length}", "smaller batches")


def _too_open(policy: Policy, terms: Mapping[str, Any]) -> Iterator[str]:
    """Less privacy than the site demands."""
    strategy, task, floor = terms["strategy"], terms["task"], policy.privacy
    if not policy.raw_updates_to_peers and (terms["released_view"] == "all_raw" or strategy in RAW_STRATEGIES):
        got = f"strategy {shown(strategy)}, which shows it to all"
        yield _refused(
            policy, "raw_updates_to_peers", "no other site to see this site's update", got, "another strategy"
        )
    cohort = terms.get("cohort_at_least", 1)
    if cohort < policy.min_clients:
        limit = f"releases mixed from at least {policy.min_clients} clients"
        yield _refused(policy, "min_clients", limit, shown(terms.get("cohort_at_least")), "a larger clients.quorum")
    mode = task.get("privacy.mode", "none")
    if mode not in MODES or MODES.index(mode) < MODES.index(floor.mode_at_least):
        allowed = _among(MODES[MODES.index(floor.mode_at_least) :])
        yield _refused(policy, "privacy.mode_at_least", allowed, shown(mode), "a stronger privacy.mode")
    unit = task.get("privacy.unit", "record")
    if mode == "example-dp" and (unit not in UNITS or UNITS.index(unit) < UNITS.index(floor.unit_at_least)):
        yield _refused(policy, "privacy.unit_at_least", floor.unit_at_least, shown(unit), "a larger privacy.unit")
    if floor.secagg and task.get("privacy.secagg") is not True:
        got = shown(task.get("privacy.secagg"))
        yield _refused(policy, "privacy.secagg", "privacy.secagg=true", got, "secure aggregation")
    if mode == "example-dp" and task.get("privacy.epsilon") is None:
        yield expected_got("terms.task: privacy.epsilon", "the budget of the run, as the site enforces it", None)
    if floor.total_epsilon is not None and mode != "example-dp":
        limit = "example-dp, which alone can be added up"
        yield _refused(policy, "privacy.total_epsilon", limit, shown(mode), "privacy.mode=example-dp")
    for name, most in (("epsilon", floor.max_epsilon), ("delta", floor.max_delta)):
        value = task.get(f"privacy.{name}") if mode != "none" else None
        if most is not None and (value is None or not 0 <= value <= most):
            got = "no privacy" if mode == "none" else shown(value)
            yield _refused(policy, f"privacy.max_{name}", f"privacy.{name} <= {most:g}", got, f"a smaller {name}")


def _among(allowed: tuple[str, ...]) -> str:
    return allowed[0] if len(allowed) == 1 else f"one of {', '.join(allowed)}"
