"""The part of a round in which the clients' changes are summed and none is seen; see `protos.secagg`.

Clients have trained and keep their updates. Attempts follow one another, each with fresh keys and whoever is there then, until
one gives a sum. Once a sum may have been shown, no sum of other clients is asked for in that round: two sums over cohorts that
differ by one client would show that client's update. The clients see to that themselves, too.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace

import numpy as np

from lamina.protos.adapter import Adapter
from lamina.protos.errors import SecureSumAborted, UpdateRejected
from lamina.protos.messages import Rejection, Release, Update
from lamina.protos.secagg import server
from lamina.protos.secagg.context import LEAST, NONCE_BYTES, Context, Participant, default_threshold
from lamina.protos.secagg.coordinates import Layout, Rule, layout, mean
from lamina.protos.secagg.encoding import encoding
from lamina.protos.secagg.messages import Masked, Opening
from lamina.protos.sides import Side, filled, numbers_of, with_numbers
from lamina.server.campaign import Campaign
from lamina.server.channel import Sums
from lamina.server.store.base import Store, Summed
from lamina.strategies.base import ServerState

ATTEMPTS = 3
# The client id of the one update that stands for all; no client's, as a name has no space.
ALL = "all summed"


@dataclass(frozen=True)
class Summing:
    """What a round's secure sum works with.

    Attributes:
        campaign: What is fixed.
        layout: What the numbers mean.
        sums: To the clients.
        store: Makes it durable which sum may have been shown.
        refuse: Told of a participant's fault.
        came: Told the bytes of each vector.
    """

    campaign: Campaign
    layout: Layout
    sums: Sums
    store: Store
    refuse: Callable[[Rejection], None]
    came: Callable[[int], None]


def layout_of(campaign: Campaign, rule: Rule, state: ServerState, side: Side) -> Layout:
    """What the numbers of a round's sum mean.

    Args:
        campaign: For the schema.
        rule: How changes are weighed.
        state: Before the round.
        side: Which factor is trained.

    Returns:
        The layout, at the ranks and scales of the global factors.
    """
    ranks = {module: factors.rank for module, factors in state.adapter.lora.items()}
    scales = {module: factors.scale for module, factors in state.adapter.lora.items()}
    return layout(campaign.spec, side, ranks, scales, rule)


def gathered(summing: Summing, version: int, trained: Collection[str]) -> Summed:
    """The sum of a round.

    Args:
        summing: With whom, and how.
        version: Of the release that training started from.
        trained: Clients that have their update ready.

    Returns:
        The sum.

    Raises:
        SecureSumAborted: If no attempt gave one.
    """
    least, able = max(LEAST, summing.campaign.quorum), set(trained)

    def refuse(rejection: Rejection) -> None:
        summing.refuse(rejection)
        if rejection.reason != "declined":  # which may be another's fault
            able.discard(rejection.client_id)

    guarded = replace(summing, refuse=refuse)
    attempt = 0
    while True:
        attempt += 1
        shown = summing.store.revealed(version + 1)
        needed = max(least, len(shown))
        there = summing.sums.ready(version + 1, shown or able, needed)
        _check_there(version + 1, len(there), needed, shown)
        try:
            return _attempt(guarded, _context(summing, version, there, least), shown)
        except SecureSumAborted:
            if attempt == ATTEMPTS:
                raise


def _check_there(round_number: int, there: int, needed: int, shown: tuple[str, ...]) -> None:
    if there >= needed:
        return
    why = f", just {', '.join(shown)}, as their sum may have been shown" if shown else ""
    raise SecureSumAborted(
        f"round {round_number}, secure sum: expected at least {needed} clients with an update ready{why}, got {there}. Start "
        "again when they can answer: what they have trained is kept at the sites. See docs/secure-aggregation.md."
    )


def _context(summing: Summing, version: int, there: tuple[Participant, ...], least: int) -> Context:
    return Context(
        run_id=summing.campaign.run_id,
        round=version + 1,
        nonce=secrets.token_bytes(NONCE_BYTES),
        layout=summing.layout.digest,
        train=summing.layout.side,
        version=version,
        participants=there,
        threshold=max(least, default_threshold(len(there))),
    )


def _attempt(summing: Summing, context: Context, shown: tuple[str, ...]) -> Summed:
    """One attempt from its first message to the sum."""
    one, wait_s = summing.layout, summing.campaign.wait_s
    state: server.State = server.begin(context, one.length)
    told: Mapping[str, server.Down] = dict.fromkeys(context.names, Opening(context, one.ranks, one.scales, one.rule))
    while True:
        for client, message in summing.sums.exchange(told, wait_s):
            try:
                state = server.receive(state, client, message)
            except UpdateRejected as error:
                summing.refuse(Rejection(client, error.reason, str(error), final=False))
                continue
            if isinstance(message, Masked):
                summing.came(message.values.nbytes)
        if isinstance(state, server.Unmasking):
            survivors = state.before.survivors
            grid = encoding(one.rule.bound, len(context.names))
            found = Summed(survivors, mean(one, grid, server.total(state), len(survivors)))
            summing.store.summed(context.round, survivors)
            return found
        state, told = server.advance(state)
        if isinstance(state, server.Agreeing) and shown and state.survivors != shown:
            raise SecureSumAborted(
                f"round {context.round}, secure sum: expected {len(shown)} clients, whose sum may have been shown before, got "
                f"{len(state.survivors)} of them. Have all of them take part; a sum of fewer would show the difference."
            )
        if isinstance(state, server.Unmasking):
            summing.store.reveal(context.round, state.before.survivors)


def as_one_update(run_id: str, state: ServerState, summed: Summed, side: Side) -> tuple[Update, Release]:
    """A sum as the update of one client of the global ranks, for a linear strategy to take its step with.

    Args:
        run_id: The run.
        state: Before the round.
        summed: What is known of the clients' updates.
        side: Which factor was trained.

    Returns:
        An update whose change is the clients' mean, in float64, and the release that it started from: zeros.
    """
    start, moved = {}, {}
    for module, change in summed.change.lora.items():
        current = state.adapter.lora[module]
        start[module] = with_numbers(current, side, np.zeros_like(numbers_of(change, side)))
        moved[module] = change
    dense = {name: np.zeros_like(value) for name, value in summed.change.dense.items()}
    release = Release(state.round, Adapter(start, dense), train=side)
    whole = filled(Adapter(moved, summed.change.dense), release.trainable, side)
    return Update(run_id, state.round + 1, ALL, "", whole, num_examples=1), release
