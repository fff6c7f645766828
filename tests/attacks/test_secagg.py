"""A coordinator or a participant that lies in a secure sum: what it must not learn, and what must stop it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from lamina.protos.errors import SecureSumAborted, SecureSumRefused, UpdateRejected
from lamina.protos.identity.signing import sign_with
from lamina.protos.secagg import client, masks, server
from lamina.protos.secagg.context import Participant
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
    Survivors,
    survivors_statement,
)
from tests.masking import Attempt, attempt, summed


def lied(one: Attempt, change: Callable[[str, Any], Any]) -> dict[str, str]:
    """Why participants gave up under a coordinator that changes what it says; no sum may come of it."""
    with pytest.raises(SecureSumAborted):
        one.run(change=change)
    return one.refused


def agreeing(one: Attempt) -> tuple[dict[str, Any], server.Summing]:
    """All participants with their vectors sent, and the coordinator that waits for them."""
    state: Any = server.begin(one.context, 40)
    for name in one.context.names:
        state = server.receive(state, name, one.begin(name))
    for _ in range(2):
        state, told = server.advance(state)
        for name, message in told.items():
            state = server.receive(state, name, one.advance(name, message))
    return dict(one.states), state


# A coordinator in the middle.


def test_keys_that_the_coordinator_made_itself_are_refused() -> None:
    one = attempt(4)
    mine = masks.key_pair(lambda size: b"\1" * size)

    def change(name: str, message: Any) -> Any:
        if not isinstance(message, Advertised):
            return message
        changed = [replace(a, share_key=mine.public) if a.name != name else a for a in message.advertisements]
        return Advertised(tuple(changed))

    assert "has signed" in lied(one, change)["site0"]


def test_keys_signed_in_another_attempt_or_for_another_purpose_are_refused() -> None:
    one, other = attempt(4, seed=1), attempt(4, seed=2)
    replayed = other.begin("site1")

    def change(name: str, message: Any) -> Any:
        if not isinstance(message, Advertised) or name == "site1":
            return message
        return Advertised(tuple(replayed if a.name == "site1" else a for a in message.advertisements))

    assert set(lied(one, change)) == {"site0", "site2", "site3"}
    key = one.signing["site1"]
    statement = replayed.statement(one.context.digest)
    assert one.context.signed("site1", KEYS_DOMAIN, statement, sign_with(key, KEYS_DOMAIN, statement))
    assert not one.context.signed("site1", KEYS_DOMAIN, statement, sign_with(key, SURVIVORS_DOMAIN, statement))


@pytest.mark.parametrize(
    "field",
    [{"run_id": "x"}, {"round": 2}, {"nonce": b"n" * 16}, {"layout": "cd" * 32}, {"train": "A"}, {"version": 1}],
)
def test_every_part_of_the_context_is_under_keys_and_signatures(field: dict[str, Any]) -> None:
    one = attempt(4)
    other = replace(one.context, **field)
    assert other.digest != one.context.digest
    sent = one.begin("site1")
    assert not other.signed("site1", KEYS_DOMAIN, sent.statement(other.digest), sent.signature)


def test_participants_and_threshold_are_in_the_context() -> None:
    one = attempt(5, 4)
    stranger = Participant("site9", Ed25519PrivateKey.generate().public_key().public_bytes_raw())
    fewer, another = one.context.participants[:4], (*one.context.participants[:4], stranger)
    digests = {replace(one.context, participants=p).digest for p in (fewer, another)}
    digests |= {one.context.digest, replace(one.context, threshold=5).digest}
    assert len(digests) == 4


def test_participants_whom_the_coordinator_made_up_cannot_sign() -> None:
    # Sybils in place of sites: their signing keys are the coordinator's, which a site sees in its list of participants.
    one = attempt(4)
    forged = tuple(replace(p, signing_key=b"") if p.name == "site1" else p for p in one.context.participants)
    with pytest.raises(SecureSumRefused, match="of every participant, or of none"):
        replace(one.context, participants=forged)


def test_a_participant_takes_no_part_under_another_key_or_without_one() -> None:
    one = attempt(4)
    unsigned = replace(one.context, participants=tuple(Participant(name) for name in one.context.names))
    with pytest.raises(SecureSumRefused, match="under its own key"):
        client.begin(unsigned, one.me("site1"), one.vectors["site1"])
    with pytest.raises(SecureSumRefused, match="under its own key"):
        client.begin(one.context, client.Me("site1"), one.vectors["site1"])


def test_without_certificates_a_signature_must_be_empty() -> None:
    one = attempt(4, signed=False)
    assert one.context.signed("site1", KEYS_DOMAIN, b"x", b"")
    assert not one.context.signed("site1", KEYS_DOMAIN, b"x", b"s")
    assert not one.context.signed("stranger", KEYS_DOMAIN, b"x", b"")


def test_a_site_has_its_own_least_number() -> None:
    one = attempt(5, 4)
    with pytest.raises(SecureSumRefused, match="at least 6"):
        client.begin(one.context, one.me("site1", least=6), one.vectors["site1"])
    state, sent = client.begin(one.context, one.me("site1", least=5), one.vectors["site1"])
    others = [one.begin(name) for name in one.context.names if name not in ("site0", "site1")]
    with pytest.raises(SecureSumRefused, match="at least 5"):
        client.advance(state, Advertised((sent, *others)))


def test_a_key_of_small_order_is_refused() -> None:
    with pytest.raises(SecureSumRefused, match="full order"):
        masks.agreed(bytes(range(32)), bytes(32))


def test_the_same_key_for_two_is_refused_by_both_sides() -> None:
    one = attempt(4, signed=False)
    state: Any = server.begin(one.context, 40)
    first, second = one.begin("site0"), one.begin("site1")
    state = server.receive(state, "site0", first)
    twin = Advertisement("site1", first.mask_key, second.share_key, second.commitment)
    with pytest.raises(UpdateRejected, match="nobody else"):
        server.receive(state, "site1", twin)
    others = (one.begin("site2"), one.begin("site3"))
    with pytest.raises(SecureSumRefused, match="different keys"):
        client.advance(one.states["site0"], Advertised((first, twin, *others)))


@pytest.mark.parametrize("byte", [0, 20, -1])
def test_a_box_that_was_changed_is_refused(byte: int) -> None:
    one = attempt(4, 4)

    def change(name: str, message: Any) -> Any:
        if not isinstance(message, Delivered) or name != "site2":
            return message
        box = bytearray(message.boxes["site1"])
        box[byte] ^= 1
        return Delivered({**message.boxes, "site1": bytes(box)})

    assert "sealed for this participant" in lied(one, change)["site2"]


def test_boxes_of_another_holder_or_another_attempt_are_refused() -> None:
    one, other = attempt(4, 4, seed=1), attempt(4, 4, seed=2)
    state: Any = server.begin(other.context, 40)
    for name in other.context.names:
        state = server.receive(state, name, other.begin(name))
    state, told = server.advance(state)
    earlier = {name: other.advance(name, message) for name, message in told.items()}
    kept: dict[str, Any] = {}

    def swapped(name: str, message: Any) -> Any:
        if isinstance(message, Delivered):
            kept[name] = message
            if name == "site3":  # what was meant for site2
                return Delivered({**message.boxes, "site1": kept["site2"].boxes["site1"]})
            if name == "site2":
                return Delivered({**message.boxes, "site1": earlier["site1"].boxes["site2"]})
        return message

    assert set(lied(one, swapped)) == {"site2", "site3"}


def test_fewer_boxes_than_the_threshold_are_refused() -> None:
    one = attempt(6, 5)

    def change(name: str, message: Any) -> Any:
        if isinstance(message, Delivered):
            return Delivered(dict(list(message.boxes.items())[:3]))
        return message

    assert "at least 5" in lied(one, change)["site0"]


# Survivors.


def test_fewer_survivors_than_the_threshold_are_refused() -> None:
    one = attempt(5, 4)
    states, _ = agreeing(one)
    with pytest.raises(SecureSumRefused, match="survivors of at least 4"):
        client.advance(states["site0"], Survivors(("site0", "site1", "site2")))


@pytest.mark.parametrize(
    "names",
    [
        ("site1", "site2", "site3", "site4"),  # itself missing
        ("site0", "site1", "site2", "site3", "site3"),
        ("site1", "site0", "site2", "site3"),
        ("site0", "site1", "site2", "site9"),
    ],
)
def test_survivors_that_cannot_be_are_refused(names: tuple[str, ...]) -> None:
    states, _ = agreeing(attempt(5, 4))
    with pytest.raises(SecureSumRefused, match="itself included"):
        client.advance(states["site0"], Survivors(names))


def test_a_participant_answers_one_set_of_survivors() -> None:
    one = attempt(6, 5)
    states, summing = agreeing(one)
    everyone = one.context.names
    state, _ = client.advance(states["site0"], Survivors(everyone))
    with pytest.raises(SecureSumRefused, match="taken once"):
        client.advance(state, Survivors(everyone[:5]))
    # Told of six, it is shown good signatures over five: it gives no share.
    statement = survivors_statement(one.context.digest, summing.view, everyone[:5])
    five = {name: sign_with(one.signing[name], SURVIVORS_DOMAIN, statement) for name in everyone[:5]}
    with pytest.raises(SecureSumRefused, match="that this participant has signed"):
        client.advance(state, Agreed(five))


def test_two_sets_of_survivors_are_never_both_answered() -> None:
    # The coordinator tells half of six that site5 has dropped out, and the other half that it has not.
    one = attempt(6, 5)
    fewer = one.context.names[:5]

    def change(name: str, message: Any) -> Any:
        return Survivors(fewer) if isinstance(message, Survivors) and name in fewer[:3] else message

    with pytest.raises(UpdateRejected, match="signature"):
        one.run(change=change)  # an honest coordinator sees it at once
    assert not [message for message in one.sent if isinstance(message, Revealed)]


def test_fewer_signatures_than_the_threshold_give_no_share() -> None:
    one = attempt(5, 4)
    states, summing = agreeing(one)
    names = one.context.names
    statement = survivors_statement(one.context.digest, summing.view, names)
    state, _ = client.advance(states["site0"], Survivors(names))
    for count in (0, 3):
        signatures = {name: sign_with(one.signing[name], SURVIVORS_DOMAIN, statement) for name in names[:count]}
        with pytest.raises(SecureSumRefused, match="signatures over one set"):
            client.advance(state, Agreed(signatures))
    forged = {name: sign_with(one.signing["site1"], SURVIVORS_DOMAIN, statement) for name in names}
    with pytest.raises(SecureSumRefused, match="a signature of"):
        client.advance(state, Agreed(forged))


def test_who_was_told_of_other_keys_cannot_sign_with_the_rest() -> None:
    # site5's shares are kept from site0 alone: its mask with site5 would stay in the sum.
    one = attempt(6, 4)

    def change(name: str, message: Any) -> Any:
        if isinstance(message, Delivered) and name == "site0":
            return Delivered({owner: box for owner, box in message.boxes.items() if owner != "site5"})
        return message

    with pytest.raises(UpdateRejected, match="signature"):
        one.run({"site5": "vector"}, change)


def test_a_share_of_each_kind_of_one_participant_is_never_given() -> None:
    one = attempt(6, 4)
    one.run({"site5": "vector"})
    revealed = [message for message in one.sent if isinstance(message, Revealed)]
    assert {name for message in revealed for name in message.keys} == {"site5"}
    assert all("site5" not in message.seeds for message in revealed)
    with pytest.raises(SecureSumRefused):
        client.advance(one.states["site0"], Agreed({}))


# Participants that lie.


def test_what_a_participant_must_not_send() -> None:
    one = attempt(4)
    state: Any = server.begin(one.context, 40)
    first = one.begin("site0")
    for client_id, message, reason in (
        ("site1", first, "wrong-client"),
        ("site9", replace(first, name="site9"), "duplicate"),
        ("site0", replace(first, signature=b"x" * 64), "signature"),
        ("site0", replace(first, commitment=b""), "signature"),
        ("site0", Masked("site0", np.zeros(40, np.uint32)), "out-of-turn"),
    ):
        with pytest.raises(UpdateRejected) as raised:
            server.receive(state, client_id, message)
        assert raised.value.reason == reason
    state = server.receive(state, "site0", first)
    with pytest.raises(UpdateRejected) as raised:
        server.receive(state, "site0", first)
    assert raised.value.reason == "duplicate"


@pytest.mark.parametrize(
    "values", [np.zeros(39, np.uint32), np.zeros(40, np.int64), np.zeros((40, 1), np.uint32), np.zeros(40, np.float32)]
)
def test_a_vector_of_another_shape_or_type_is_refused(values: np.ndarray) -> None:
    one = attempt(4)
    _, summing = agreeing(one)
    waiting = replace(summing, got=summing.got - {"site0"})
    with pytest.raises(UpdateRejected, match="numbers of 32 bits"):
        server.receive(waiting, "site0", Masked("site0", values))


def test_wrong_shares_are_passed_over_while_enough_are_right() -> None:
    one = attempt(5, 4)
    _, summing = agreeing(one)
    state: Any = summing
    for kind in (Agreement, Revealed):
        state, told = server.advance(state)
        for name, message in told.items():
            answer = one.advance(name, message)
            assert isinstance(answer, kind)
            if name == "site1" and isinstance(answer, Revealed):
                answer = replace(answer, seeds={**answer.seeds, "site3": bytes(66)})
            state = server.receive(state, name, answer)
    assert (server.total(state) == summed(one, one.context.names)).all()
    lying = {name: replace(m, seeds={**m.seeds, "site3": bytes(66)}) for name, m in state.got.items() if name < "site2"}
    with pytest.raises(SecureSumAborted, match="site3 announced"):
        server.total(replace(state, got={**state.got, **lying}))


def test_shares_of_another_secret_than_was_announced_give_no_sum() -> None:
    one = attempt(4)
    state: Any = server.begin(one.context, 40)
    for name in one.context.names:
        state = server.receive(state, name, one.begin(name))
    liar = one.states["site3"]
    assert isinstance(liar, client.KeysSent)
    one.states["site3"] = replace(liar, seed=bytes(range(32)))
    for _ in range(4):
        state, told = server.advance(state)
        for name, message in told.items():
            state = server.receive(state, name, one.advance(name, message))
    with pytest.raises(SecureSumAborted, match="site3 announced"):
        server.total(state)


def test_a_box_for_another_holder_does_not_open_even_under_the_right_key() -> None:
    one = attempt(4)
    states = {name: client.begin(one.context, one.me(name), one.vectors[name]) for name in one.context.names}
    advertised = Advertised(tuple(sent for _, sent in states.values()))
    sharing: dict[str, Any] = {name: client.advance(state, advertised) for name, (state, _) in states.items()}
    boxes = {name: shares.boxes["site0"] for name, (_, shares) in sharing.items() if name != "site0"}
    mine, other = states["site0"][0], states["site1"][0]
    secret = masks.agreed(other.share.private, mine.share.public)
    key = masks.derived(secret, one.context.digest, "share", "site1", "site0")
    assert masks.unsealed(key, boxes["site1"], client.bound(one.context, "site1", "site0"), "")
    for owner, holder in (("site1", "site2"), ("site2", "site0")):
        box = masks.sealed(key, bytes(132), client.bound(one.context, owner, holder), one.me("site1").draw)
        with pytest.raises(SecureSumRefused, match="sealed for this participant"):
            client.advance(sharing["site0"][0], Delivered({**boxes, "site1": box}))


def test_shares_of_the_wrong_kind_or_number_are_refused() -> None:
    one = attempt(5, 4)
    _, summing = agreeing(one)
    state: Any
    state, told = server.advance(summing)
    for name, message in told.items():
        state = server.receive(state, name, one.advance(name, message))
    state, told = server.advance(state)
    good = one.advance("site0", told["site0"])
    for bad in (
        replace(good, keys={"site1": bytes(66)}),
        replace(good, seeds={name: share for name, share in good.seeds.items() if name != "site1"}),
        replace(good, seeds={**good.seeds, "site1": bytes(65)}),
    ):
        with pytest.raises(UpdateRejected, match="of the one kind that is due"):
            server.receive(state, "site0", bad)


def test_a_liar_with_a_bad_box_stops_the_attempt_and_learns_nothing() -> None:
    one = attempt(4)
    state: Any = server.begin(one.context, 40)
    for name in one.context.names:
        state = server.receive(state, name, one.begin(name))
    state, told = server.advance(state)
    for name, message in told.items():
        answer = one.advance(name, message)
        if name == "site3":
            answer = replace(answer, boxes=dict.fromkeys(answer.boxes, bytes(160)))
        state = server.receive(state, name, answer)
    state, told = server.advance(state)
    answers = [one.advance(name, message) for name, message in told.items()]
    assert [a for a in answers if a is not None and a.name != "site3"] == []
    assert "shares of site3" in one.refused["site0"]
