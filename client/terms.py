"""Whether a coordinator's terms are what terms are: every value of its type and size, every setting one that is its to make.

Only what passes here is looked at further. Nothing raises on any input, however odd, and no odd text reaches a terminal.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from lamina.protos.config import SITE_KEYS, Config
from lamina.protos.errors import nearest, shown

PROTOCOL = 1
VIEWS = ("own", "aggregate", "all_raw")

# What a coordinator may set; a dot at the end means all below. The rest is the site's own: where its data and model are,
# which columns are read, its device. A key that is new to the configuration is refused until it is listed here.
DICTATED = (
    "task",
    "rounds",
    "seed",
    "strategy.",
    "train.",
    "lora.",
    "adapter.",
    "wire.",
    "evaluate.",
    "privacy.",
    "aggregation.",
    "data.loss_on",
    "data.template",
    "data.labels",
)

NAME = re.compile(r"(?!\.{1,2}\Z)[^/\\\x00-\x1f\x7f]{1,128}")
HASH = re.compile(r"[0-9a-f]{64}")
_MAX_TEXT = 4096
_MAX_SCHEMA_BYTES = 64 * 1024**2  # it is read whole
_MAX_CHUNK_BYTES = 16 * 1024**2  # the link sends no message above 24 MiB
_MAX_DEPTH = 4
_MAX_INTEGER = 2**63 - 1


def malformed(terms: Any) -> Iterator[str]:
    """What is wrong with terms before their content is weighed.

    Args:
        terms: Whatever came.

    Yields:
        A sentence for each fault.
    """
    if not isinstance(terms, Mapping):
        yield expected_got("terms", "a mapping", terms)
        return
    for key, (expected, fits) in _TERMS.items():
        if key not in terms:
            yield expected_got(f"terms.{key}", expected, None, "Update the older side.")
        elif not fits(terms[key]):
            yield expected_got(f"terms.{key}", expected, terms[key], "Update the older side.")
    for key, (expected, fits) in _OPTIONAL.items():
        if key in terms and not fits(terms[key]):
            yield expected_got(f"terms.{key}", expected, terms[key], "Update the older side.")
    task = terms.get("task")
    if isinstance(task, Mapping):
        yield from _undictated(task)
        for key, same in (("rounds", "rounds"), ("strategy.name", "strategy")):
            if key in task and task[key] != terms.get(same):
                yield expected_got(f"terms.task: {key}", f"what terms.{same} says", task[key])


def _undictated(task: Mapping[Any, Any]) -> Iterator[str]:
    """Settings that are unknown, not the coordinator's to make, or of another type."""
    known = leaf_types()
    for key, value in task.items():
        if not isinstance(key, str) or key not in known:
            hint = nearest(key[:100], known) if isinstance(key, str) else ""
            yield expected_got("terms.task", "settings that this version knows", key, f"Update the older side.{hint}")
        elif not _dictated(key, value):
            yield (
                f"terms.task: {key}: expected to be left to the site, got {shown(value)}. "
                "This setting is the site's own; the coordinator must not send it."
            )
        elif not _typed(value, known[key]):
            expected = getattr(known[key], "__name__", str(known[key]))
            yield expected_got(f"terms.task: {key}", f"a value of type {expected}", value)


def _dictated(key: str, value: Any) -> bool:
    if key in SITE_KEYS:
        return value is None  # which sets nothing
    return any(key == one or (one[-1] == "." and key.startswith(one)) for one in DICTATED)


def expected_got(where: str, expected: str, got: Any, then: str = "") -> str:
    """A sentence about what a coordinator said.

    Args:
        where: In what it said.
        expected: What would have been right.
        got: Anything.
        then: What to do, if something can be done.

    Returns:
        One line.
    """
    return f"{where}: expected {expected}, got {shown(got)}. {then or 'Ask the operator of the coordinator.'}"


def whole(value: Any, lowest: int) -> bool:
    """Whether a value is an integer, of a size that other programs can hold.

    Args:
        value: Anything.
        lowest: Smallest that is allowed.

    Returns:
        True for lowest <= value < 2^63.
    """
    return isinstance(value, int) and not isinstance(value, bool) and lowest <= value <= _MAX_INTEGER


def number(value: Any) -> bool:
    """Whether a value is a finite number, of a size that other programs can hold.

    Args:
        value: Anything.

    Returns:
        True for finite floats and integers of at most 64 bits.
    """
    return whole(value, -_MAX_INTEGER) or (isinstance(value, float) and math.isfinite(value))


@cache
def leaf_types() -> Mapping[str, Any]:
    """The declared type of every dotted key of a run's configuration.

    Returns:
        Key -> type.
    """

    def walk(kind: Any, path: str) -> Iterator[tuple[str, Any]]:
        for name, hint in get_type_hints(kind).items():
            if is_dataclass(hint):
                yield from walk(hint, f"{path}{name}.")
            else:
                yield path + name, hint

    return dict(walk(Config, ""))


def _typed(value: Any, hint: Any) -> bool:
    if hint is Any:
        return _plain(value, _MAX_DEPTH)
    if get_origin(hint) is list:
        (inner,) = get_args(hint)
        return isinstance(value, list) and all(_typed(one, inner) for one in value)
    if isinstance(hint, UnionType):
        return any(_typed(value, one) for one in get_args(hint))
    if hint is int:
        return whole(value, -_MAX_INTEGER)
    if hint is float:
        return number(value)
    if hint is str:
        return isinstance(value, str) and len(value) <= _MAX_TEXT
    return hint in (bool, NoneType) and isinstance(value, hint)


def _plain(value: Any, depth: int) -> bool:
    """Whether a value is JSON of little depth."""
    if depth and isinstance(value, list):
        return all(_plain(one, depth - 1) for one in value)
    if depth and isinstance(value, Mapping):
        return all(isinstance(key, str) and _plain(one, depth - 1) for key, one in value.items())
    text = isinstance(value, str) and len(value) <= _MAX_TEXT
    return text or value is None or isinstance(value, bool) or number(value)


def _name(value: Any) -> bool:
    return isinstance(value, str) and NAME.fullmatch(value) is not None


def _is_hash(value: Any) -> bool:
    return isinstance(value, str) and HASH.fullmatch(value) is not None


def _table(value: Any, fits: Callable[[Any], bool]) -> bool:
    return isinstance(value, Mapping) and all(isinstance(key, str) and fits(one) for key, one in value.items())


def _is_budget(value: Any) -> bool:
    """Ranks and scales by module, as in `messages.Budget`."""
    return (
        isinstance(value, Mapping)
        and set(value) == {"train", "download", "scale", "held_version"}
        and _table(value["train"], lambda rank: whole(rank, 1))
        and _table(value["download"], lambda rank: whole(rank, 0))
        and _table(value["scale"], lambda scale: number(scale) and scale > 0)
        and whole(value["held_version"], -1)
    )


def _is_schema(value: Any) -> bool:
    named = isinstance(value, list) and len(value) == 2 and _is_hash(value[0]) and whole(value[1], 0)
    return named and value[1] <= _MAX_SCHEMA_BYTES


# What every coordinator says, in words and as a test.
_TERMS: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "protocol": (str(PROTOCOL), lambda value: whole(value, PROTOCOL) and value <= PROTOCOL),
    "run_id": ("a name without slashes", _name),
    "client_id": ("a name without slashes", _name),
    "consortium": ("a name", lambda value: isinstance(value, str) and len(value) <= _MAX_TEXT),
    "rank": ("a whole number >= 1", lambda value: whole(value, 1)),
    "rounds": ("a whole number >= 1", lambda value: whole(value, 1)),
    "strategy": ("a name", _name),
    "released_view": (f"one of {', '.join(VIEWS)}", lambda value: isinstance(value, str) and value in VIEWS),
    "task": ("settings by dotted key", lambda value: isinstance(value, Mapping)),
    "hashes": (
        "SHA-256 hashes by name, `weights` among them",
        lambda value: isinstance(value, Mapping) and "weights" in value and all(map(_is_hash, value.values())),
    ),
    "budget": ("ranks and scales by module", _is_budget),
    "spec": ("the SHA-256 and length of the schema, at most 64 MiB", _is_schema),
    "heartbeat_s": ("0.05 to 3600 seconds", lambda value: number(value) and 0.05 <= value <= 3600),
    "chunk_bytes": ("at most 16 MiB", lambda value: whole(value, 1) and value <= _MAX_CHUNK_BYTES),
}

# What a coordinator may say besides.
_OPTIONAL: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "cohort_at_least": ("a whole number >= 1", lambda value: whole(value, 1)),
    "deadline_s": ("seconds > 0", lambda value: number(value) and value > 0),
}
