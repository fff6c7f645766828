"""The one port: mutual TLS, the gate before every method, limits on connections, messages and calls."""

from __future__ import annotations

import resource
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from lamina.protos.coordinator_pb2_grpc import add_CoordinatorServicer_to_server
from lamina.protos.errors import ConfigError
from lamina.protos.identity import Identity
from lamina.protos.logs import Log
from lamina.protos.statements import MAX_STATEMENT_BYTES
from lamina.server.port.access import Gate
from lamina.server.port.calls import threads
from lamina.server.port.masks import Masks
from lamina.server.port.operations import Operators
from lamina.server.port.run import Run
from lamina.server.port.sites import Sites

# Statements and one part of an adapter are the largest messages there are.
_MESSAGE_SLACK = 64 * 1024
# Real time: whoever connects and says nothing is a fault of the network or an attack, at whatever rate clocks run.
_HANDSHAKE_MS, _IDLE_MS = 10_000, 120_000
_MOST_FILES = 65_536


class Port(Operators, Masks, Sites):
    """All methods of `lamina.v1.Coordinator`."""


def listen(run: Run, identity: Identity | None, log: Log) -> tuple[grpc.Server, int, Any]:
    """Open the port.

    Args:
        run: What the handlers share.
        identity: The coordinator's, or None without certificates.
        log: Told of what no method expects.

    Returns:
        The running server, the number of its port, and its health.

    Raises:
        ConfigError: If the address cannot be had.
    """
    address = run.config.coordinator.listen
    workers = threads(run.config.clients.count)
    limit = max(run.config.wire.chunk_bytes, MAX_STATEMENT_BYTES) + _MESSAGE_SLACK
    server = grpc.server(
        ThreadPoolExecutor(workers, thread_name_prefix="port"),
        interceptors=[Gate(run.access, log)],
        maximum_concurrent_rpcs=workers,
        options=[
            ("grpc.so_reuseport", 0),  # a second coordinator on the port is an error, not a coin toss
            ("grpc.max_receive_message_length", limit),
            ("grpc.max_send_message_length", limit),
            ("grpc.max_metadata_size", 16 * 1024),
            ("grpc.server_handshake_timeout_ms", _HANDSHAKE_MS),
            ("grpc.max_connection_idle_ms", _IDLE_MS),  # without a call; a site that listens always has one
            # The other half is the store's: connections cannot take the files that a round needs.
            ("grpc.max_allowed_incoming_connections", _open_files() // 2),
            ("grpc.keepalive_time_ms", int(run.clock.real(30_000))),
            ("grpc.keepalive_timeout_ms", int(run.clock.real(20_000))),
            ("grpc.http2.min_recv_ping_interval_without_data_ms", 1000),
            ("grpc.http2.max_ping_strikes", 0),
        ],
    )
    add_CoordinatorServicer_to_server(Port(run), server)  # type: ignore[no-untyped-call]
    status = health.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(status, server)
    status.set("", health_pb2.HealthCheckResponse.SERVING)
    status.set("lamina.v1.Coordinator", health_pb2.HealthCheckResponse.SERVING)
    try:
        if identity is None:
            port = server.add_insecure_port(address)
        else:
            pair = [(identity.tls_key_pem, identity.certificate_pem)]
            credentials = grpc.ssl_server_credentials(pair, identity.ca_pem, require_client_auth=True)
            port = server.add_secure_port(address, credentials)
    except RuntimeError:
        port = 0
    if not port:
        raise ConfigError(f"coordinator.listen={address}: expected a free port, it cannot be had. Choose another.")
    server.start()
    return server, port, status


def _open_files() -> int:
    """How many files this process may have open, once it has raised its own limit as far as it may."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft, hard = (_MOST_FILES if one == resource.RLIM_INFINITY else one for one in limits)
    wanted = max(soft, min(hard, _MOST_FILES))
    if wanted > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, limits[1]))
    return wanted
