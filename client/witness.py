"""A site's countersignature over the head of the coordinator's log: whoever rewrites what a site has seen is found out."""

from __future__ import annotations

from typing import Any

from lamina.client.spool import Spool
from lamina.client.terms import HASH
from lamina.protos import statements as st
from lamina.protos.chain import WITNESS_DOMAIN, Head, witness_statement
from lamina.protos.errors import IdentityError


def countersigned(spool: Spool, log: Any, name: str, sign: st.Sign) -> list[Any] | None:
    """A countersignature over the head that an instruction names, remembered before it is given.

    Args:
        spool: Of the run, with the heads seen before.
        log: What the instruction says of the log; nothing of it is believed.
        name: The site's.
        sign: Its identity.

    Returns:
        Number, hash and signature (hex) of the head, or None where none is named.

    Raises:
        IdentityError: If the log has gone back, or another record is where one was seen.
    """
    if not isinstance(log, list) or [type(one) for one in log] != [int, str]:
        return None
    head = Head(*log)
    if not 0 <= head.n < st.MAX_NUMBER or HASH.fullmatch(head.hash) is None:
        return None
    before = spool.witnessed()
    if before is not None and (head.n < before.n or (head.n == before.n and head.hash != before.hash)):
        raise IdentityError(
            f"the coordinator's log: expected record {before.n} with hash {before.hash[:12]}… or a later one, got "
            f"{head.n} with {head.hash[:12]}…: it was cut or rewritten. Ask its operator; if it was restored from a copy, "
            f"stop this agent and move {spool.root} away."
        )
    if before != head:
        spool.witness(head)
    signature = sign(WITNESS_DOMAIN, witness_statement(name, head))
    return [head.n, head.hash, signature.hex()]
