"""What a client is told when it registers: which run, which base, what to train, and what it may hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lamina.protos.blobs import Blob
from lamina.protos.config import SITE_KEYS, Config, known_keys, value_of
from lamina.protos.messages import Budget
from lamina.protos.statements import PROTOCOL, TERMS, budget_document
from lamina.server.campaign import Campaign

# What the coordinator decides. All else, such as where the data lie and on which device to train, is the site's.
_SECTIONS = ("train.", "lora.", "wire.", "privacy.", "adapter.", "strategy.")
_KEYS = ("task", "rounds", "seed", "evaluate.split", "evaluate.max_examples", "evaluate.batch_size")
# What the coordinator has for itself.
_OWN_SECTIONS = ("coordinator.", "clients.", "evaluate.", "aggregation.")
_OWN_KEYS = ("insecure", "keep_updates", "checkpoints", "output")
_SIMULATION = "clients.dropout_rate"


def coordinator_keys() -> list[str]:
    """Every key that a coordinator reads: what it decides for all clients, and its own.

    Returns:
        Dotted keys, in the order of the tree.
    """
    mine = {key for key in known_keys() if key.startswith(_OWN_SECTIONS) or key in _OWN_KEYS} - {_SIMULATION}
    mine |= set(task_keys())
    return [key for key in known_keys() if key in mine]


def task_keys() -> list[str]:
    """The keys that the coordinator decides for every client.

    Returns:
        Dotted keys.
    """
    return [key for key in known_keys() if (key.startswith(_SECTIONS) or key in _KEYS) and key not in SITE_KEYS]


def terms(
    config: Config, campaign: Campaign, spec: Blob, client_id: str, rank: int, budget: Budget, consortium: str
) -> dict[str, Any]:
    """The document that a client's registration is answered with.

    Args:
        config: The run's.
        campaign: Run id, schema and strategy.
        spec: The schema file.
        client_id: Whose.
        rank: Its nominal rank.
        budget: What it may hold.
        consortium: Of the certificates, empty without.

    Returns:
        JSON values.
    """
    return {
        "kind": TERMS,
        "protocol": PROTOCOL,
        "run_id": campaign.run_id,
        "client_id": client_id,
        "consortium": consortium,
        "rank": rank,
        "rounds": campaign.rounds,
        "hashes": dict(campaign.spec.hashes),
        "spec": [spec.sha256, spec.num_bytes],
        "strategy": campaign.strategy.name,
        "released_view": campaign.strategy.released_view,
        "cohort_at_least": campaign.quorum,
        "deadline_s": config.clients.deadline_s,
        "budget": budget_document(budget),
        "heartbeat_s": config.wire.heartbeat_s,
        "chunk_bytes": config.wire.chunk_bytes,
        "task": {key: _plain(value_of(config, key)) for key in task_keys()},
    }


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(one) for one in value]
    return value
