"""A site's part in a secure sum: its change as a vector in the sum's coordinates, and what it lets itself be asked.

The update stays at the site. It may be asked for in several attempts, as these are given up when clients are lost; but once the
site has shown its part of what masks a sum, it takes part in no sum of other clients in that round.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from lamina.protos.adapter import Adapter, Array
from lamina.protos.blobs import Blob
from lamina.protos.codec import loaded, opened, opened_update
from lamina.protos.errors import SecureSumRefused
from lamina.protos.messages import Budget, Instruction
from lamina.protos.secagg import client
from lamina.protos.secagg.client import KeysSent, Me, State
from lamina.protos.secagg.coordinates import encoded, layout
from lamina.protos.secagg.encoding import encoding
from lamina.protos.secagg.messages import Advertisement, Opening, Survivors
from lamina.protos.secagg.server import Down, Up
from lamina.protos.sides import Side, whole
from lamina.protos.spec import AdapterSpec


@dataclass(frozen=True)
class Part:
    """What a client has to put into a round's sum.

    Attributes:
        instruction: What it was asked, with the release's parts.
        update: What it made of it, encoded.
        spec: The run's schema.
        budget: Its ranks and scales.
        seed: Of the run, for what has not moved since the start.
        shown: The clients whose sum it has helped to show in this round, if any.
    """

    instruction: Instruction
    update: Blob
    spec: AdapterSpec
    budget: Budget
    seed: int
    shown: tuple[str, ...] = ()


def begin(part: Part, me: Me, opening: Opening) -> tuple[KeysSent, Advertisement]:
    """Take part in an attempt.

    Args:
        part: What is put in.
        me: The participant.
        opening: What the coordinator says of the attempt.

    Returns:
        The state, and the message to send.

    Raises:
        SecureSumRefused: If the attempt is about another round, release or factor, or would show more than one sum.
        AdapterMismatch: If the update does not fit the global factors.
        TrainingError: If a change is out of range.
    """
    asked, context = part.instruction, opening.context
    if (context.run_id, context.round, context.train, context.version) != (
        asked.run_id,
        asked.round,
        asked.train,
        asked.version,
    ):
        raise SecureSumRefused(
            f"round {asked.round}: expected a secure sum of lora_{asked.train} trained from release {asked.version} in this "
            f"round, got one of lora_{context.train} from {context.version} in round {context.round}."
        )
    check_shown(part.shown, context.names, asked.round)
    if asked.train == "AB":
        raise SecureSumRefused(f"round {asked.round}: expected one factor to be summed, got {asked.train}.")
    one = layout(part.spec, asked.train, opening.ranks, opening.scales, opening.rule)
    if one.digest != context.layout:
        raise SecureSumRefused(f"round {asked.round}: expected ranks, scales and rule of the secure sum's own digest.")
    update = opened_update(part.update)
    grid = encoding(opening.rule.bound, len(context.names))
    values: Array = encoded(one, grid, update.adapter, _start(part, asked.train), update.num_examples)
    return client.begin(context, me, values)


def answered(part: Part, me: Me, state: State | None, message: Down) -> tuple[Part, State, Up]:
    """One step of an attempt.

    Args:
        part: What is put in.
        me: The participant.
        state: Where it is, None before the first attempt.
        message: What the coordinator says; an opening begins anew.

    Returns:
        The part, which knows from now on what was shown; the next state; and the message to send. The part must be durable before
        the message leaves.

    Raises:
        SecureSumRefused: If the attempt is to be given up.
        AdapterMismatch: See `begin`.
        TrainingError: See `begin`.
    """
    if isinstance(message, Opening):
        begun, advertisement = begin(part, me, message)
        return part, begun, advertisement
    if state is None:
        raise SecureSumRefused("secure sum: expected an opening first, got a later message.")
    if isinstance(message, Survivors):
        check_shown(part.shown, message.names, part.instruction.round)
    after, answer = client.advance(state, message)
    if isinstance(state, client.Agreeing):
        part = replace(part, shown=state.survivors)
    return part, after, answer


def check_shown(shown: tuple[str, ...], names: tuple[str, ...], round_number: int) -> None:
    """Raise where a second sum of a round would be over other clients than the first.

    Args:
        shown: Whose sum was shown, empty for none.
        names: Whose sum is asked for now.
        round_number: The round.

    Raises:
        SecureSumRefused: If they differ.
    """
    if shown and names != shown:
        raise SecureSumRefused(
            f"round {round_number}: expected a secure sum over the {len(shown)} clients of the one that was shown already, got "
            f"one over {len(names)}: the difference of the two would show single updates."
        )


def _start(part: Part, side: Side) -> Adapter:
    """What training started from, whole."""
    asked = part.instruction
    parts = [loaded(opened(one)) for one in (asked.release, asked.frozen) if one is not None]
    start = whole(parts, part.budget.train, part.budget.scale, part.spec.modules, part.seed, side)
    dense: Mapping[str, Array] = {**part.spec.dense, **start.dense}
    return Adapter(start.lora, dense)
