"""The coordinator's side of an attempt, as pure steps on frozen states: `begin`, `receive` what comes, then `advance`.

    Advertising  -->  Sharing  -->  Summing  -->  Agreeing  -->  Unmasking  -->  `total`

Whoever has not sent what a state waits for drops out with `advance`. Vectors are added up as they come; none is kept.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from lamina.protos.adapter import Array
from lamina.protos.errors import SecureSumAborted, UpdateRejected
from lamina.protos.secagg import masks, shamir
from lamina.protos.secagg.context import Context
from lamina.protos.secagg.messages import (
    KEYS_DOMAIN,
    SURVIVORS_DOMAIN,
    Advertised,
    Advertisement,
    Agreed,
    Agreement,
    Declined,
    Delivered,
    Masked,
    Opening,
    Revealed,
    Shares,
    Survivors,
    survivors_statement,
    view_of,
)

Up = Advertisement | Shares | Masked | Agreement | Revealed | Declined
Down = Opening | Advertised | Delivered | Survivors | Agreed
# Of a secret whose shares do not agree: sets of shares that are tried before the attempt is given up.
_TRIES = 200


@dataclass(frozen=True)
class Advertising:
    """Waits for keys.

    Attributes:
        context: The attempt.
        length: Of the vectors.
        got: Name -> what came.
    """

    context: Context
    length: int
    got: Mapping[str, Advertisement] = field(default_factory=dict)


@dataclass(frozen=True)
class Sharing:
    """Waits for shares.

    Attributes:
        context: The attempt.
        length: Of the vectors.
        advertised: Name -> keys.
        got: Name -> what came.
    """

    context: Context
    length: int
    advertised: Mapping[str, Advertisement]
    got: Mapping[str, Shares] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Summing:
    """Waits for vectors.

    Attributes:
        context: The attempt.
        advertised: Name -> keys, of those whose shares were delivered.
        view: See `messages.view_of`.
        sum: (n,), uint32: of the vectors that came, modulo 2**32.
        got: The names of their senders.
    """

    context: Context
    advertised: Mapping[str, Advertisement]
    view: bytes
    sum: Array
    got: frozenset[str] = frozenset()


@dataclass(frozen=True, eq=False)
class Agreeing:
    """Waits for signatures over the survivors.

    Attributes:
        before: The state before.
        survivors: Whose vectors are in the sum, in order.
        got: Name -> signature.
    """

    before: Summing
    survivors: tuple[str, ...]
    got: Mapping[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Unmasking:
    """Waits for shares of what masks the sum.

    Attributes:
        before: The state before.
        got: Name -> what came.
    """

    before: Agreeing
    got: Mapping[str, Revealed] = field(default_factory=dict)


State = Advertising | Sharing | Summing | Agreeing | Unmasking


def begin(context: Context, length: int) -> Advertising:
    """Open an attempt.

    Args:
        context: The attempt, which everyone is told.
        length: Of the vectors, in numbers.

    Returns:
        The first state.
    """
    return Advertising(context, length)


def waited_for(state: State) -> frozenset[str]:
    """Whose message a state still waits for.

    Args:
        state: Any.

    Returns:
        Names.
    """
    match state:
        case Advertising():
            there: frozenset[str] = frozenset(state.context.names)
        case Sharing() | Summing():
            there = frozenset(state.advertised)
        case Agreeing():
            there = frozenset(state.survivors)
        case Unmasking():
            there = frozenset(state.before.survivors)
    return there - frozenset(state.got)


def receive(state: State, client: str, message: Up) -> State:
    """Take one message in.

    Args:
        state: What is waited for.
        client: Who sent it, as the channel authenticated it.
        message: What it says.

    Returns:
        The state with it.

    Raises:
        UpdateRejected: If it is not what this client was to send now; the state stays as it was.
    """
    if message.name != client:
        raise UpdateRejected("wrong-client", f"client {client}: expected its own message, got one of another client.")
    if client not in waited_for(state):
        raise UpdateRejected(
            "duplicate", f"client {client}: expected one message of a participant that is still there."
        )
    match state, message:
        case _, Declined():
            raise UpdateRejected("declined", f"client {client}: has given the secure sum up; its own log says why.")
        case Advertising(), Advertisement():
            return _advertised(state, message)
        case Sharing(), Shares():
            return _shared(state, message)
        case Summing(), Masked():
            return _added(state, message)
        case Agreeing(), Agreement():
            return _signed(state, message)
        case Unmasking(), Revealed():
            return _revealed(state, message)
    raise UpdateRejected(
        "out-of-turn", f"client {client}: expected its part in {type(state).__name__}, got {type(message).__name__}."
    )


def _advertised(state: Advertising, message: Advertisement) -> Advertising:
    context, name = state.context, message.name
    if not context.signed(name, KEYS_DOMAIN, message.statement(context.digest), message.signature):
        raise UpdateRejected("signature", f"client {name}: expected keys that it has signed for this attempt.")
    keys = {message.mask_key, message.share_key}
    known = {key for one in state.got.values() for key in (one.mask_key, one.share_key)}
    sizes = {len(one) for one in (*keys, message.commitment)}
    if len(keys) != 2 or keys & known or sizes != {masks.KEY_BYTES}:
        raise UpdateRejected("malformed", f"client {name}: expected two keys of 32 bytes that are nobody else's.")
    return replace(state, got={**state.got, name: message})


def _shared(state: Sharing, message: Shares) -> Sharing:
    if set(message.boxes) != set(state.advertised) - {message.name}:
        raise UpdateRejected("malformed", f"client {message.name}: expected a box for each other participant.")
    return replace(state, got={**state.got, message.name: message})


def _added(state: Summing, message: Masked) -> Summing:
    if message.values.dtype != np.uint32 or message.values.shape != state.sum.shape:
        raise UpdateRejected("schema", f"client {message.name}: expected {state.sum.size} numbers of 32 bits.")
    return replace(state, sum=state.sum + message.values, got=state.got | {message.name})


def _signed(state: Agreeing, message: Agreement) -> Agreeing:
    before = state.before
    statement = survivors_statement(before.context.digest, before.view, state.survivors)
    if not before.context.signed(message.name, SURVIVORS_DOMAIN, statement, message.signature):
        raise UpdateRejected(
            "signature", f"client {message.name}: expected its signature over the survivors that it was told."
        )
    return replace(state, got={**state.got, message.name: message.signature})


def _revealed(state: Unmasking, message: Revealed) -> Unmasking:
    survivors = set(state.before.survivors)
    dropouts = set(state.before.before.advertised) - survivors
    sizes = {len(one) for one in (*message.seeds.values(), *message.keys.values())}
    if set(message.seeds) != survivors or set(message.keys) != dropouts or sizes != {shamir.SHARE_BYTES}:
        raise UpdateRejected(
            "malformed", f"client {message.name}: expected a share for each participant, of the one kind that is due."
        )
    return replace(state, got={**state.got, message.name: message})


def advance(state: Advertising | Sharing | Summing | Agreeing) -> tuple[State, Mapping[str, Down]]:
    """Go on with what came; whoever is still waited for has dropped out.

    Args:
        state: With enough messages.

    Returns:
        The next state, and the message to each client that is left.

    Raises:
        SecureSumAborted: If fewer than the threshold are left.
    """
    match state:
        case Advertising():
            _check_enough(state.context, len(state.got), "sent keys")
            told = Advertised(tuple(state.got[name] for name in sorted(state.got)))
            return Sharing(state.context, state.length, dict(state.got)), dict.fromkeys(sorted(state.got), told)
        case Sharing():
            _check_enough(state.context, len(state.got), "sent shares")
            left = {name: state.advertised[name] for name in sorted(state.got)}
            view = view_of(state.context.digest, state.advertised.values(), left)
            boxes = {
                name: Delivered({other: state.got[other].boxes[name] for other in left if other != name})
                for name in left
            }
            return Summing(state.context, left, view, np.zeros(state.length, np.uint32)), boxes
        case Summing():
            _check_enough(state.context, len(state.got), "sent their vectors")
            survivors = tuple(sorted(state.got))
            return Agreeing(state, survivors), dict.fromkeys(survivors, Survivors(survivors))
        case Agreeing():
            _check_enough(state.before.context, len(state.got), "signed the survivors")
            signatures = Agreed(dict(state.got))
            return Unmasking(state), dict.fromkeys(state.survivors, signatures)


def total(state: Unmasking) -> Array:
    """The sum without its masks.

    Args:
        state: With enough shares.

    Returns:
        (n,), uint32: the sum modulo 2**32 of what the survivors put in.

    Raises:
        SecureSumAborted: If fewer than the threshold gave shares, or these are of no secrets that fit.
    """
    summing, survivors = state.before.before, state.before.survivors
    context = summing.context
    _check_enough(context, len(state.got), "gave shares")
    places = {name: place for place, name in enumerate(context.names)}
    values = summing.sum.copy()
    for name in survivors:
        shares = {places[holder]: one.seeds[name] for holder, one in state.got.items()}
        seed = _secret(context, shares, _commits(context, summing.advertised[name].commitment), name)
        masks.add_stream(values, masks.self_key(seed, context.digest, name), -1)
    for name in summing.advertised.keys() - set(survivors):
        shares = {places[holder]: one.keys[name] for holder, one in state.got.items()}
        private = _secret(context, shares, _owns(summing.advertised[name].mask_key), name)
        for other in survivors:
            key = masks.pair_key(private, summing.advertised[other].mask_key, context.digest, (name, other))
            masks.add_stream(values, key, -1 if name > other else 1)
    return values


def _commits(context: Context, commitment: bytes) -> Callable[[bytes], bool]:
    return lambda seed: masks.commitment(seed, context.digest) == commitment


def _owns(public: bytes) -> Callable[[bytes], bool]:
    return lambda private: masks.pair_of(private).public == public


def _secret(context: Context, shares: Mapping[int, bytes], fits: Callable[[bytes], bool], name: str) -> bytes:
    """The secret behind shares of which some may be wrong: from the first set of threshold size that fits."""
    for chosen in itertools.islice(itertools.combinations(sorted(shares), context.threshold), _TRIES):
        try:
            secret = shamir.combined({holder: shares[holder] for holder in chosen})
        except SecureSumAborted:
            continue
        if fits(secret):
            return secret
    raise SecureSumAborted(
        f"round {context.round}, secure sum: expected shares of the secret that {name} announced, got others from "
        "a participant. The attempt is given up; nothing is known of any update."
    )


def _check_enough(context: Context, there: int, did: str) -> None:
    if there < context.threshold:
        raise SecureSumAborted(
            f"round {context.round}, secure sum: expected at least {context.threshold} of {len(context.names)} participants, "
            f"{there} {did}. The attempt is given up; nothing is known of any update."
        )
