"""A participant's side of an attempt, as pure steps on frozen states: `begin`, then `advance` with each message that comes.

    KeysSent  --Advertised-->  SharesSent  --Delivered-->  VectorSent  --Survivors-->  Agreeing  --Agreed-->  Finished

A state has one way forward, so a participant answers one set of survivors once and gives of each other one kind of share. A
state must not be advanced twice: whoever runs it replaces it by the next one before anything is sent, and gives an attempt up
that was interrupted. After Bonawitz et al. 2017 (doi:10.1145/3133956.3133982), with the consistency round against a coordinator
that lies; and the whole of keys and names is under the survivors' signatures, so that all who sign have seen the same.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from lamina.protos.adapter import Array
from lamina.protos.errors import SecureSumRefused
from lamina.protos.identity import canonical
from lamina.protos.secagg import masks, shamir
from lamina.protos.secagg.context import LEAST, Context
from lamina.protos.secagg.messages import (
    KEYS_DOMAIN,
    SURVIVORS_DOMAIN,
    Advertised,
    Advertisement,
    Agreed,
    Agreement,
    Delivered,
    Masked,
    Revealed,
    Shares,
    Survivors,
    survivors_statement,
    view_of,
)

Sign = Callable[[str, bytes], bytes]


def no_identity(domain: str, statement: bytes) -> bytes:
    """Signs nothing: for simulations and runs without certificates, whose participants have no keys to check against.

    Args:
        domain: Of the statement.
        statement: Any.

    Returns:
        The empty signature.
    """
    return b""


@dataclass(frozen=True)
class Me:
    """A participant, as itself.

    Attributes:
        name: Its client id.
        signing_key: Its own raw Ed25519 public key; empty without certificates.
        sign: Domain and statement to a signature.
        least: Fewest updates among which it lets its own be summed, by its site's policy.
        draw: Number of bytes to that many, unpredictable.
    """

    name: str
    signing_key: bytes = b""
    sign: Sign = field(default=no_identity, repr=False)
    least: int = LEAST
    draw: shamir.Draw = field(default=os.urandom, repr=False)


@dataclass(frozen=True, eq=False)
class KeysSent:
    """Keys are sent.

    Attributes:
        context: The attempt.
        me: The participant.
        values: (n,), uint32: what is summed, encoded.
        mask: Its mask keys.
        share: Its share keys.
        seed: Of its own mask.
        sent: Its advertisement.
    """

    context: Context
    me: Me
    values: Array = field(repr=False)
    mask: masks.KeyPair
    share: masks.KeyPair
    seed: bytes = field(repr=False)
    sent: Advertisement


@dataclass(frozen=True, eq=False)
class SharesSent:
    """Shares are sent.

    Attributes:
        before: The state before.
        advertised: Name -> keys of all who are left.
        own: Its shares of its own two secrets, of which it is a holder, too.
    """

    before: KeysSent
    advertised: Mapping[str, Advertisement]
    own: bytes = field(repr=False)


@dataclass(frozen=True, eq=False)
class VectorSent:
    """The vector is sent, under masks with all whose shares came. Neither it nor any key is kept.

    Attributes:
        context: The attempt.
        me: The participant.
        view: SHA-256 over all keys, and the names of those whose shares came.
        held: Name -> shares of its seed and of its mask key.
    """

    context: Context
    me: Me
    view: bytes
    held: Mapping[str, bytes] = field(repr=False)


@dataclass(frozen=True, eq=False)
class Agreeing:
    """A set of survivors is signed, and no other will be.

    Attributes:
        before: The state before.
        survivors: The set.
    """

    before: VectorSent
    survivors: tuple[str, ...]


@dataclass(frozen=True)
class Finished:
    """Shares are given; nothing is kept."""


State = KeysSent | SharesSent | VectorSent | Agreeing | Finished


def begin(context: Context, me: Me, values: Array) -> tuple[KeysSent, Advertisement]:
    """Take part in an attempt.

    Args:
        context: The attempt.
        me: The participant.
        values: (n,), uint32: what is summed, encoded.

    Returns:
        The state, and the message to send.

    Raises:
        SecureSumRefused: If the participant is not one, or is there under another key, or too few are.
    """
    if me.name not in context.names or context.signing_key(me.name) != me.signing_key:
        raise SecureSumRefused(
            f"round {context.round}: expected {me.name} under its own key among the participants of the secure sum."
        )
    _check_enough(context, me, context.names, "participants")
    mask, share, seed = masks.key_pair(me.draw), masks.key_pair(me.draw), me.draw(shamir.SECRET_BYTES)
    bare = Advertisement(me.name, mask.public, share.public, masks.commitment(seed, context.digest))
    signature = me.sign(KEYS_DOMAIN, bare.statement(context.digest))
    sent = Advertisement(me.name, mask.public, share.public, bare.commitment, signature)
    return KeysSent(context, me, values, mask, share, seed, sent), sent


def advance(
    state: State, incoming: Advertised | Delivered | Survivors | Agreed
) -> tuple[State, Shares | Masked | Agreement | Revealed]:
    """One step.

    Args:
        state: What the participant is at.
        incoming: What the coordinator says.

    Returns:
        The next state, and the message to send.

    Raises:
        SecureSumRefused: If the message is not what may come now; the attempt is over for the participant.
    """
    match state, incoming:
        case KeysSent(), Advertised():
            return _share(state, incoming)
        case SharesSent(), Delivered():
            return _mask(state, incoming)
        case VectorSent(), Survivors():
            return _agree(state, incoming)
        case Agreeing(), Agreed():
            return _reveal(state, incoming)
    raise SecureSumRefused(
        f"expected what follows {type(state).__name__}, got {type(incoming).__name__}. A step is taken once."
    )


def _share(state: KeysSent, incoming: Advertised) -> tuple[SharesSent, Shares]:
    context, me = state.context, state.me
    found = {one.name: one for one in incoming.advertisements}
    _check_enough(context, me, tuple(found), "sets of keys")
    if len(found) != len(incoming.advertisements) or found.get(me.name) != state.sent:
        raise _refused(context, "one set of keys of each participant, this one's as it sent them")
    for name, one in found.items():
        if not context.signed(name, KEYS_DOMAIN, one.statement(context.digest), one.signature):
            raise _refused(context, f"keys that {name} has signed for this attempt")
    keys = [key for one in incoming.advertisements for key in (one.mask_key, one.share_key)]
    if len(set(keys)) != len(keys) or {len(key) for key in keys} != {masks.KEY_BYTES}:
        raise _refused(context, "different keys of 32 bytes")
    holders = len(context.names)
    seeds = shamir.split(state.seed, holders, context.threshold, me.draw)
    private = shamir.split(state.mask.private, holders, context.threshold, me.draw)
    both = dict(zip(context.names, (b + k for b, k in zip(seeds, private, strict=True)), strict=True))
    boxes = {}
    for name, one in found.items():
        if name != me.name:
            key = masks.derived(
                masks.agreed(state.share.private, one.share_key), context.digest, "share", me.name, name
            )
            boxes[name] = masks.sealed(key, both[name], bound(context, me.name, name), me.draw)
    return SharesSent(state, found, both[me.name]), Shares(me.name, boxes)


def _mask(state: SharesSent, incoming: Delivered) -> tuple[VectorSent, Masked]:
    before = state.before
    context, me, mine = before.context, before.me, before.me.name
    if not incoming.boxes.keys() <= state.advertised.keys() - {mine}:
        raise _refused(context, "shares of those whose keys it has")
    there = tuple(sorted({mine, *incoming.boxes}))
    _check_enough(context, me, there, "participants' shares")
    held = {mine: state.own}
    for name, box in incoming.boxes.items():
        secret = masks.agreed(before.share.private, state.advertised[name].share_key)
        key = masks.derived(secret, context.digest, "share", name, mine)
        content = masks.unsealed(key, box, bound(context, name, mine), f"round {context.round}, shares of {name}")
        if len(content) != 2 * shamir.SHARE_BYTES:
            raise _refused(context, f"two shares of {name}")
        held[name] = content
    values = np.array(before.values, np.uint32)
    masks.add_stream(values, masks.self_key(before.seed, context.digest, mine), 1)
    for name in there:
        if name != mine:
            public = state.advertised[name].mask_key
            key = masks.pair_key(before.mask.private, public, context.digest, (mine, name))
            masks.add_stream(values, key, 1 if name > mine else -1)
    view = view_of(context.digest, state.advertised.values(), there)
    return VectorSent(context, me, view, held), Masked(mine, values)


def _agree(state: VectorSent, incoming: Survivors) -> tuple[Agreeing, Agreement]:
    context, names = state.context, incoming.names
    if list(names) != sorted(set(names)) or not set(names) <= state.held.keys() or state.me.name not in names:
        raise _refused(context, "survivors among those whose shares it holds, itself included, in order")
    _check_enough(context, state.me, names, "survivors")
    signature = state.me.sign(SURVIVORS_DOMAIN, survivors_statement(context.digest, state.view, names))
    return Agreeing(state, names), Agreement(state.me.name, signature)


def _reveal(state: Agreeing, incoming: Agreed) -> tuple[Finished, Revealed]:
    before, context = state.before, state.before.context
    statement = survivors_statement(context.digest, before.view, state.survivors)
    for name, signature in incoming.signatures.items():
        if name not in state.survivors or not context.signed(name, SURVIVORS_DOMAIN, statement, signature):
            raise _refused(context, f"a signature of {name} over the survivors that this participant has signed")
    _check_enough(context, before.me, tuple(incoming.signatures), "signatures over one set of survivors")
    size, held = shamir.SHARE_BYTES, before.held
    seeds = {name: held[name][:size] for name in state.survivors}
    keys = {name: held[name][size:] for name in held if name not in state.survivors}
    return Finished(), Revealed(before.me.name, seeds, keys)


def _check_enough(context: Context, me: Me, names: tuple[str, ...], what: str) -> None:
    least = max(context.threshold, me.least)
    if len(set(names)) < least:
        raise SecureSumRefused(
            f"round {context.round}: expected {what} of at least {least} in the secure sum, got {len(set(names))}. "
            "Have more sites take part, or lower the site's min_clients."
        )


def bound(context: Context, owner: str, holder: str) -> bytes:
    """What a box of shares is bound to.

    Args:
        context: The attempt.
        owner: Whose secrets.
        holder: For whom.

    Returns:
        Canonical JSON.
    """
    return canonical({"ctx": context.digest.hex(), "from": owner, "to": holder})


def _refused(context: Context, expected: str) -> SecureSumRefused:
    return SecureSumRefused(
        f"round {context.round}, secure sum: expected {expected}, got something else. The attempt is given up; ask the "
        "operator of the coordinator."
    )
