"""The round loop: open, offer, admit, step, make durable, evaluate, announce. Plain values; channel and store do the I/O.

Follow one update here: it starts from `_release`, comes back in `_collect` as a blob, is admitted or counted as a rejection,
and enters the next global adapter in `Strategy.step`. Each of these is in the store before anyone is told of it, so that a
loop that is started again goes on where the last one was killed.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import cast

import numpy as np

from lamina.protos import seeds
from lamina.protos.errors import BudgetSpent, ConfigError, QuorumNotReached, SecureSumAborted, UpdateRejected
from lamina.protos.messages import Budget, Rejection, Release, Reply, Update
from lamina.protos.sides import Side
from lamina.server import admission, secure, selection, spending
from lamina.server.campaign import Campaign
from lamina.server.channel import Channel, Sums
from lamina.server.releases import Sent, holding, release_errors, released, started, trained
from lamina.server.store.base import Collected, Completed, Evaluation, Opened, Store, evaluation_record
from lamina.strategies.base import ServerState, client_weights

# Of a rejection's sentence, in which a client's own words may stand.
_MESSAGE = 500

Evaluate = Callable[[ServerState, Mapping[str, int]], Evaluation | None]
Present = Callable[[int], Mapping[str, Budget]]


@dataclass(frozen=True)
class Loop:
    """What a running loop works with.

    Attributes:
        campaign: What is fixed.
        channel: To the clients.
        evaluate: Held-out figures of a state, given what clients hold; None where its round is not evaluated.
        store: Makes each step durable.
        present: Round -> who may be asked; default: the campaign's own clients.
        sums: To the clients, where only the sum of their updates is seen.
    """

    campaign: Campaign
    channel: Channel
    evaluate: Evaluate
    store: Store = field(default_factory=Store)
    present: Present | None = None
    sums: Sums | None = None


def run(loop: Loop, resumed: Completed | None = None) -> ServerState:
    """Run a campaign to its last round.

    Args:
        loop: What to do, with whom, and where it is kept.
        resumed: The last durable round of an interrupted run.

    Returns:
        The final state.

    Raises:
        QuorumNotReached: If a round has too few accepted updates. What arrived is in the store.
    """
    state = resumed.state if resumed else loop.campaign.strategy.init(loop.campaign.spec)
    held: Mapping[str, int] = resumed.held if resumed else {}
    if resumed and not resumed.announced:
        _announce(loop, resumed, time.monotonic())
    while state.round < loop.campaign.rounds:
        completed = run_round(loop, state, held)
        state, held = completed.state, completed.held
    return state


def run_round(loop: Loop, state: ServerState, held: Mapping[str, int]) -> Completed:
    """One round from state to state.

    Args:
        loop: What to do, with whom, and where it is kept.
        state: Before the round.
        held: Client id -> version of the release that it holds; -1 or absent for none.

    Returns:
        The finished and announced round.

    Raises:
        QuorumNotReached: If too few updates are accepted.
    """
    started, number = time.monotonic(), state.round + 1
    round_open = loop.store.opened(number)
    if round_open is None:
        round_open = _open(loop, state, held)
        loop.store.open(round_open)
    elif loop.store.missed(number):
        round_open = _opened_again(loop, state, held, round_open)
        loop.store.open_again(round_open)
    collected = loop.store.collected(number)
    _offer(loop, round_open, collected)
    with ThreadPoolExecutor(1, initializer=_politely) as beside:
        # While the clients train: it takes a while on large layers, and nothing waits for it.
        errors = beside.submit(release_errors, loop.campaign, state, round_open.sent)
        if loop.campaign.masking is None:
            _collect(loop, round_open, collected)
        else:
            _sum(loop, state, round_open, collected)
        collected.seconds = time.monotonic() - started
        collected.errors = errors.result()
    if len(collected.clients) < _quorum(loop.campaign, round_open):
        loop.store.miss(number)
        _check_budgets(number, collected)
        reasons = ", ".join(sorted({r.reason for r in collected.rejections})) or "no reply"
        raise QuorumNotReached(
            f"round {number}: expected at least {loop.campaign.quorum} accepted updates of {len(round_open.sent)} asked, "
            f"got {len(collected.clients)} ({reasons}). Start again when more clients can "
            "answer: what arrived is kept, and everyone else is asked again. Or lower clients.quorum."
        )
    if collected.sum is None:
        loop.store.close(number)
    known = {(one.client_id, one.reason) for one in collected.rejections}
    collected.rejections += [one for one in loop.store.refused(number) if (one.client_id, one.reason) not in known]
    completed = _step(loop.campaign, state, held, round_open, collected)
    loop.store.save(completed)
    return _announce(loop, completed, started)


def _quorum(campaign: Campaign, round_open: Opened) -> int:
    """Fewest updates for the round to count. Under client-dp who was drawn is enough: to draw again would be another sampling."""
    return campaign.quorum if campaign.plan is None else min(campaign.quorum, len(round_open.sent))


def _check_budgets(number: int, collected: Collected) -> None:
    """Raise where a round cannot be because privacy budgets do not allow it: to ask again would change nothing."""
    spent = sorted(r.client_id for r in collected.rejections if (r.reason, r.message) == ("failed", "privacy"))
    if spent:
        raise BudgetSpent(
            f"round {number}: the privacy budget of client {', '.join(spent)} does not allow it, and without them there are too "
            "few updates. What was completed is kept. Each site's log says what was spent; start again when a site's policy or "
            "another client allows the round, or take the adapter of the round before with `lamina export`."
        )


def _politely() -> None:
    """Let every other thread go first, where the system knows how."""
    if hasattr(os, "setpriority"):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)


def _step(
    campaign: Campaign, state: ServerState, held: Mapping[str, int], round_open: Opened, collected: Collected
) -> Completed:
    """The next state and the round's record, as yet without held-out figures."""
    sent = round_open.sent
    updates, releases = _updates(campaign, state, sent, collected)
    began = time.monotonic()
    after = campaign.strategy.step(state, updates, releases, seeds.stream(campaign.seed, "step", round_open.round))
    after = replace(after, privacy_history=(*after.privacy_history, *spending.charges(campaign.promise, updates)))
    told = updates if campaign.promise is None else []  # what a client says all the same is not written down
    train_losses = _claimed(told, "train_loss")
    record = {
        "round": round_open.round,
        "clients": collected.clients,
        "asked": sorted(sent),
        "rejections": [_rejection_record(rejection) for rejection in collected.rejections],
        **evaluation_record(None),
        "train_loss": float(np.mean(train_losses)) if train_losses else None,
        "bytes_up": collected.num_bytes,
        "bytes_down": sum(one.num_bytes for one in sent.values() if one.instruction.round == round_open.round),
        "relative_error": after.relative_error,
        "dropped_norm": max((layer.dropped_norm for layer in after.report.values()), default=0.0),
        "release_error": max(collected.errors.values(), default=0.0),
        "release_error_by_client": dict(collected.errors),
        "seconds_collect": collected.seconds,
        "seconds_aggregate": time.monotonic() - began,
        "seconds_train": sum(_claimed(told, "seconds")),
        "epsilon": spending.worst_so_far(campaign.promise, after.privacy_history),
    }
    now_held = dict(held) | {client: sent[client].instruction.version for client in collected.clients}
    weights = client_weights(updates, campaign.weighting) if updates else {}
    return Completed(after, record, updates, releases, weights, now_held, announced=False)


def _updates(
    campaign: Campaign, state: ServerState, sent: Mapping[str, Sent], collected: Collected
) -> tuple[list[Update], dict[str, Release]]:
    """What the strategy takes its step with: each client's update, or one that stands for all."""
    if collected.sum is not None:
        update, release = secure.as_one_update(campaign.run_id, state, collected.sum, _side(sent))
        return [update], {update.client_id: release}
    releases = {client: started(campaign, sent[client]) for client in collected.updates}
    return [trained(collected.updates[client], releases[client]) for client in sorted(collected.updates)], releases


def _side(sent: Mapping[str, Sent]) -> Side:
    """The one factor that a round trains."""
    sides = {one.instruction.train for one in sent.values()}
    if len(sides) != 1 or sides == {"AB"}:
        raise ConfigError(
            f"privacy.secagg=true: expected a strategy that trains one factor a round, got {', '.join(sorted(sides))}. "
            "Set strategy=ffa, or privacy.secagg=false."
        )
    return cast(Side, sides.pop())


def _rejection_record(rejection: Rejection) -> dict[str, str]:
    """Who and why; of a failure also its code, which is from a fixed list."""
    code = {"code": rejection.message} if rejection.reason == "failed" else {}
    return {"client_id": rejection.client_id, "reason": rejection.reason, **code}


def _announce(loop: Loop, completed: Completed, started: float) -> Completed:
    evaluating = time.monotonic()
    evaluation = loop.evaluate(completed.state, completed.held)
    figures = {
        **evaluation_record(evaluation),
        "seconds": time.monotonic() - started,
        "seconds_evaluate": time.monotonic() - evaluating,
    }
    told = replace(completed, record={**completed.record, **figures}, evaluation=evaluation, announced=True)
    loop.store.announce(told)
    return told


def _claimed(updates: Sequence[Update], metric: str) -> list[float]:
    """What clients say of themselves, without what cannot be: it is shown, never used."""
    claims = [update.metrics[metric] for update in updates if metric in update.metrics]
    return [claim for claim in claims if 0 <= claim < 1e9]


def _open(loop: Loop, state: ServerState, held: Mapping[str, int]) -> Opened:
    """Choose who is asked and make their releases; stragglers of earlier rounds keep what they were sent."""
    campaign, number = loop.campaign, state.round + 1
    carried = {
        client: one
        for client, one in loop.store.stragglers(state.round).items()
        if number - one.instruction.round <= campaign.carry_rounds
    }
    pool = {c: b for c, b in (loop.present or campaign.present)(number).items() if c not in carried}
    if campaign.plan is not None and campaign.plan.central.sample_rate < 1:
        asked = selection.sampled(campaign.streams("cohort", number), pool, campaign.plan.central.sample_rate)
        fewer = len(asked)
    else:
        asked = selection.cohort(campaign.seed, number, pool, campaign.fraction * (1 + campaign.over_selection))
        fewer = selection.size(len(pool), campaign.fraction)
    budgets = holding({client: pool[client] for client in asked}, loop.store.held(held))
    sent = released(campaign, loop.store.keep, state, budgets)
    return Opened(number, dict(sorted({**carried, **sent}.items())), fewer + len(carried))


def _opened_again(loop: Loop, state: ServerState, held: Mapping[str, int], before: Opened) -> Opened:
    """A round that missed its quorum: who failed is asked again, and whoever has come since is asked too."""
    campaign, number = loop.campaign, before.round
    pool = (loop.present or campaign.present)(number) if campaign.plan is None else {}
    budgets = holding({c: b for c, b in pool.items() if c not in before.sent}, loop.store.held(held))
    sent = {**before.sent, **released(campaign, loop.store.keep, state, budgets)}
    return Opened(number, dict(sorted(sent.items())), max(before.wanted, campaign.quorum))


def _offer(loop: Loop, round_open: Opened, collected: Collected) -> None:
    """Ask everyone who has not answered; what had arrived before an interruption is judged first."""
    if collected.closed:
        return
    for reply in loop.store.unjudged(round_open.round):
        _judge(loop, round_open, reply, collected)
        if reply.update is not None:
            collected.judged[reply.client_id] = reply.update.sha256
    answered = {*collected.updates, *(rejection.client_id for rejection in collected.rejections)}
    outstanding = [one.instruction for client, one in round_open.sent.items() if client not in answered]
    loop.channel.offer(outstanding)


def _collect(loop: Loop, round_open: Opened, collected: Collected) -> None:
    """Admit what arrives until the round is full; a client's fault is a counted rejection."""
    if collected.closed or _has_enough(round_open, collected):
        return
    for reply in loop.channel.replies(loop.campaign.deadline_s):
        if reply.update is None or collected.judged.get(reply.client_id) != reply.update.sha256:
            _judge(loop, round_open, reply, collected)
        if _has_enough(round_open, collected):
            return


def _sum(loop: Loop, state: ServerState, round_open: Opened, collected: Collected) -> None:
    """Wait until the clients have trained, then learn the sum of what they keep."""
    campaign = loop.campaign
    if campaign.masking is None or loop.sums is None:
        raise ConfigError("privacy.secagg=true: expected a channel that carries secure sums, got another.")

    def came(num_bytes: int) -> None:
        collected.num_bytes += num_bytes

    def refuse(rejection: Rejection) -> None:
        _refuse(loop, round_open, rejection, collected)

    ready = set()
    for reply in loop.channel.replies(campaign.deadline_s):
        if reply.trained:
            ready.add(reply.client_id)
        else:
            refuse(Rejection(reply.client_id, "failed", reply.failure))
    layout = secure.layout_of(campaign, campaign.masking, state, _side(round_open.sent))
    summing = secure.Summing(campaign, layout, loop.sums, loop.store, refuse, came)
    try:
        collected.sum = secure.gathered(summing, state.round, ready)
    except SecureSumAborted:
        loop.store.miss(round_open.round)
        raise


def _has_enough(round_open: Opened, collected: Collected) -> bool:
    """Whether more were asked than are wanted, and so many have answered; otherwise everyone is heard."""
    return len(round_open.sent) > round_open.wanted <= len(collected.updates)


def _judge(loop: Loop, round_open: Opened, reply: Reply, collected: Collected) -> None:
    rejection = _admitted(loop, round_open, reply, collected)
    if rejection is not None:
        _refuse(loop, round_open, rejection, collected)


def _refuse(loop: Loop, round_open: Opened, rejection: Rejection, collected: Collected) -> None:
    loop.store.reject(round_open.round, rejection)
    known = {(one.client_id, one.reason) for one in collected.rejections}
    if (rejection.client_id, rejection.reason) not in known:  # once, however often a client sends such
        collected.rejections.append(rejection)


def _admitted(loop: Loop, round_open: Opened, reply: Reply, collected: Collected) -> Rejection | None:
    """Take one reply in, or say why not."""
    if reply.update is None:
        return Rejection(reply.client_id, "failed", reply.failure)
    collected.num_bytes += reply.update.num_bytes
    try:
        if reply.client_id not in round_open.sent:
            raise UpdateRejected("wrong-client", f"client {reply.client_id} was not asked in this round.")
        update = admission.admit(
            reply.update, _expected(loop.campaign, round_open.sent[reply.client_id]), collected.updates
        )
    except UpdateRejected as error:
        return Rejection(reply.client_id, error.reason, str(error)[:_MESSAGE])
    except FileNotFoundError:
        return None  # its file was swept: it came for a round that is over
    loop.store.admit(round_open.round, reply)
    collected.updates[reply.client_id] = update
    return None


def _expected(campaign: Campaign, sent: Sent) -> admission.Expected:
    return admission.Expected(
        run_id=campaign.run_id,
        round=sent.instruction.round,
        client_id=sent.instruction.client_id,
        parent_release_hash=sent.instruction.release_hash,
        spec=campaign.spec,
        budget=sent.budget,
        received=started(campaign, sent).trainable,
        max_norm=campaign.max_norm,
        train=sent.instruction.train,
        promise=campaign.promise,
    )
