"""Who is who in a consortium: certificates, signing keys, and the checks on both. The CA itself is in `authority`."""

from lamina.protos.errors import IdentityError
from lamina.protos.identity.certificates import ROLES, Peer, peer_of, verified_peer
from lamina.protos.identity.checks import Finding, check
from lamina.protos.identity.folder import Identity, load, sign
from lamina.protos.identity.revocations import Revocations, check_in_force, list_of, read_revocations
from lamina.protos.identity.signing import canonical, verify
from lamina.protos.identity.tls import require_tls13

__all__ = [
    "ROLES",
    "Finding",
    "Identity",
    "IdentityError",
    "Peer",
    "Revocations",
    "canonical",
    "check",
    "check_in_force",
    "list_of",
    "load",
    "peer_of",
    "read_revocations",
    "require_tls13",
    "sign",
    "verified_peer",
    "verify",
]
