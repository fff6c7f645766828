"""Prometheus figures of a coordinator, off unless `coordinator.metrics` names an address. Nothing in them is of one client."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server
from prometheus_client.process_collector import ProcessCollector

from lamina.protos.errors import ConfigError


class Metrics:
    """The figures.

    Args:
        live: How many clients are heard of now.
        uploading: How many uploads are being written now.
    """

    def __init__(self, live: Callable[[], float], uploading: Callable[[], float]) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._round = Gauge("lamina_round", "Last completed round", registry=self.registry)
        self._loss = Gauge("lamina_held_out_loss", "Held-out loss after it, nats a token", registry=self.registry)
        self._epsilon = Gauge(
            "lamina_privacy_epsilon", "Worst client's epsilon so far, 0 without privacy", registry=self.registry
        )
        self._seconds = Histogram(
            "lamina_round_seconds",
            "Duration of a round",
            registry=self.registry,
            buckets=(0.1, 1, 10, 60, 600, 3600, 36000),
        )
        self._up = Counter("lamina_received_bytes", "Bytes of updates", registry=self.registry)
        self._down = Counter("lamina_released_bytes", "Bytes of releases", registry=self.registry)
        self._updates = Counter("lamina_updates", "Accepted updates", registry=self.registry)
        self._rejections = Counter("lamina_rejections", "Rejections by reason", ["reason"], registry=self.registry)
        Gauge("lamina_clients_live", "Clients heard of lately", registry=self.registry).set_function(live)
        Gauge("lamina_uploads_active", "Uploads being written", registry=self.registry).set_function(uploading)

    def completed(self, record: Mapping[str, Any]) -> None:
        """Take in the record of a round."""
        self._round.set(record["round"])
        if record["loss"] is not None:
            self._loss.set(record["loss"])
        if record["epsilon"] is not None:
            self._epsilon.set(record["epsilon"])
        self._seconds.observe(record["seconds"])
        self._up.inc(record["bytes_up"])
        self._down.inc(record["bytes_down"])
        self._updates.inc(len(record["clients"]))
        for rejection in record["rejections"]:
            self._rejections.labels(rejection["reason"]).inc()

    def serve(self, address: str) -> tuple[Any, Any]:
        """Open the endpoint.

        Args:
            address: host:port.

        Returns:
            Server and thread.

        Raises:
            ConfigError: If the address cannot be had.
        """
        host, _, port = address.rpartition(":")
        if not host or not port.isdigit():
            raise ConfigError(f"coordinator.metrics={address}: expected host:port, such as 127.0.0.1:9100.")
        try:
            return start_http_server(int(port), addr=host, registry=self.registry)
        except OSError as error:
            raise ConfigError(f"coordinator.metrics={address}: expected a free port, got {error.strerror}.") from None
