"""Server maths: pure functions on plain values. `build` turns a name into a strategy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from lamina.protos.errors import ConfigError, nearest
from lamina.strategies.base import ServerState, Strategy, Weighting
from lamina.strategies.baselines import Shared, fedavg, flexlora, zeropad
from lamina.strategies.exact import Rule, recompress, residual, stack
from lamina.strategies.linear import Nested, alternate, core, ffa

STRATEGIES = ("recompress", "residual", "stack", "fedavg", "zeropad", "flexlora", "ffa", "alternate", "core")

__all__ = ["STRATEGIES", "Options", "ServerState", "Strategy", "build"]


@dataclass(frozen=True)
class Options:
    """What a strategy may need to know of the run.

    Attributes:
        rank: Module -> largest rank among the clients.
        scale: Module -> scale of the client with the largest rank.
        rank_cap: For `recompress`.
        weighting: See `base.client_weights`.
        learning_rate: The server's eta, for the exact strategies.
        seed: Of the common start of the strategies that have one.
    """

    rank: Mapping[str, int]
    scale: Mapping[str, float]
    rank_cap: int | None = None
    weighting: Weighting = "num_examples"
    learning_rate: float = 1.0
    seed: int = 0


def build(name: str, options: Options) -> Strategy:
    """A strategy by its name.

    Args:
        name: One of `STRATEGIES`.
        options: Of the run.

    Returns:
        The strategy. Where no module has factors, it is that name's mean of dense parameters, and says of itself what holds of
        one: exact, linear, in stable coordinates, of any ranks, and nobody sees more than the aggregate.

    Raises:
        ConfigError: If the name is unknown, or the strategy cannot use an option.
    """
    found = _named(name, options)
    if options.rank:
        return found
    return replace(
        found, exact=True, equal_ranks=False, linear=True, released_view="aggregate", stable_coordinates=True
    )


def _named(name: str, options: Options) -> Strategy:
    rule = Rule(options.rank_cap, options.weighting, options.learning_rate)
    nested = Nested(options.rank, options.scale, options.seed, options.weighting, options.learning_rate)
    shared = Shared(options.rank, options.scale, options.seed, options.weighting)
    if name in ("fedavg", "zeropad", "flexlora") and options.learning_rate != 1.0:
        raise ConfigError(f"aggregation.learning_rate={options.learning_rate}: {name} has none. Use an exact strategy.")
    match name:
        case "recompress":
            return recompress(rule)
        case "residual":
            return residual(rule)
        case "stack":
            return stack(rule)
        case "fedavg":
            return fedavg(shared)
        case "zeropad":
            return zeropad(shared)
        case "flexlora":
            return flexlora(options.weighting)
        case "ffa":
            return ffa(nested)
        case "alternate":
            return alternate(nested)
        case "core":
            return core(nested)
    raise ConfigError(f"strategy.name={name}: expected one of {', '.join(STRATEGIES)}.{nearest(name, STRATEGIES)}")
