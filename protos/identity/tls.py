"""TLS 1.3 for gRPC, which has no setting for it in Python."""

from __future__ import annotations

import os


def require_tls13() -> None:
    """Let gRPC of this process speak TLS 1.3 alone. To be called before `grpc` is imported: it reads its settings then.

    gRPC's one setting names the cipher suites of TLS 1.2. The one named here needs an RSA certificate; ours are all ECDSA,
    so a handshake below 1.3 finds no suite and fails. The suites of TLS 1.3 are not touched by the setting.
    """
    os.environ["GRPC_SSL_CIPHER_SUITES"] = "ECDHE-RSA-AES256-GCM-SHA384"
    # Every port scan that offers no certificate would otherwise put a line of gRPC's own among the JSON of a log.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
