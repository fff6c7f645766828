"""Ranks by module: what a client of one nominal rank trains, how large that is, and which other ranks take no more.

A client may train less than its offer in any module. Under `lora.allocation=importance` it may also move ranks from one module
to another, as long as its adapter has no more numbers than the uniform one.
"""

from __future__ import annotations

from collections.abc import Mapping

from lamina.protos.errors import ConfigError, shown
from lamina.protos.messages import Trainable
from lamina.protos.spec import AdapterSpec

# How many times the nominal rank one module may get under lora.allocation=importance.
SPREAD = 4


def uniform(spec: AdapterSpec, rank: int, pattern: Mapping[str, int] | None = None) -> dict[str, int]:
    """One rank for every module, as far as its shape and the pattern admit.

    Args:
        spec: Module shapes.
        rank: The nominal rank.
        pattern: Module-name suffix -> largest rank there.

    Returns:
        Module -> rank; modules of rank 0 are absent.
    """
    found = {}
    for module in spec.modules:
        capped = min([rank, *_caps(module, pattern)])
        if capped > 0:
            found[module] = spec.clamped(capped, module)
    return found


def most(spec: AdapterSpec, rank: int, pattern: Mapping[str, int] | None = None) -> dict[str, int]:
    """The largest rank of each module that an allocation by importance may choose.

    Args:
        spec: Module shapes.
        rank: The nominal rank.
        pattern: Module-name suffix -> largest rank there.

    Returns:
        Module -> rank.
    """
    return uniform(spec, SPREAD * rank, pattern)


def numbers(spec: AdapterSpec, ranks: Mapping[str, int], train: Trainable = "AB") -> int:
    """How many numbers the factors of these ranks have.

    Args:
        spec: Module shapes.
        ranks: Module -> rank.
        train: The factors that are counted.

    Returns:
        sum of rank x (d_out + d_in), rank x d_out, rank x d_in or rank^2.
    """
    return sum(size(spec.modules[module], rank, train) for module, rank in ranks.items())


def size(shape: tuple[int, int], rank: int, train: Trainable = "AB") -> int:
    """How many numbers the factors of one module have.

    Args:
        shape: (d_out, d_in).
        rank: Of the factors.
        train: The factors that are counted.

    Returns:
        As many.
    """
    if train == "core":
        return rank * rank
    d_out, d_in = shape
    return rank * (d_out * ("B" in train) + d_in * ("A" in train))


def check(spec: AdapterSpec, ranks: Mapping[str, int], rank: int, pattern: Mapping[str, int], allocation: str) -> None:
    """Raise unless ranks take no more than a nominal rank.

    Args:
        spec: Module shapes.
        ranks: Module -> rank, as a client asks for; each at least 1.
        rank: The nominal rank that the client is offered.
        pattern: Module-name suffix -> largest rank there.
        allocation: `uniform`, or `importance`.

    Raises:
        ConfigError: Naming the first module that is unknown or gets too much, or the sum.
    """
    offered = uniform(spec, rank, pattern)
    moved = allocation == "importance"
    largest = most(spec, rank, pattern) if moved else offered
    for module, wanted in ranks.items():
        if module not in spec.modules:
            raise ConfigError(f"ranks: expected modules of the run's schema, got {shown(module)}.")
        if wanted > largest.get(module, 0):
            raise ConfigError(f"ranks: expected at most {largest.get(module, 0)} for {module}, got {wanted}.")
    if moved and numbers(spec, ranks) > numbers(spec, offered):
        raise ConfigError(
            f"ranks: expected an adapter of at most {numbers(spec, offered)} numbers, as with rank {rank} everywhere, got "
            f"{numbers(spec, ranks)}."
        )
    if not ranks and not spec.dense:
        raise ConfigError("ranks: expected some module to train, every one has rank 0.")


def ends_so(module: str, suffix: str) -> bool:
    """Whether a module's name is a suffix, or ends with it after a dot.

    Args:
        module: Full name.
        suffix: Such as `q_proj`.

    Returns:
        True or False.
    """
    return module == suffix or module.endswith("." + suffix)


def _caps(module: str, pattern: Mapping[str, int] | None) -> list[int]:
    return [cap for suffix, cap in (pattern or {}).items() if ends_so(module, suffix)]
