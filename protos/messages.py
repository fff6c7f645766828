"""What travels between coordinator and clients, as frozen values. How it is encoded is `codec`'s business."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from lamina.protos.adapter import EMPTY, Adapter
from lamina.protos.blobs import Blob
from lamina.protos.files import sha256

Trainable = Literal["AB", "A", "B", "core"]
Kind = Literal["train", "evaluate"]


@dataclass(frozen=True)
class Budget:
    """What one client can hold, per module; modules that it does not train are absent.

    Attributes:
        train: Module -> rank that it trains.
        download: Module -> rank that it can receive in all, trainable part included.
        scale: Module -> the runtime scale at which it trains.
        held_version: The release that the client holds already, -1 for none.
    """

    train: Mapping[str, int]
    download: Mapping[str, int]
    scale: Mapping[str, float]
    held_version: int = -1


@dataclass(frozen=True)
class Wish:
    """What a client registers for.

    Attributes:
        rank: Its nominal rank; None for what it is offered.
        ranks: Module -> rank, where not that of the nominal one in every module.
        format: Number format of its base, empty where it does not say.
    """

    rank: int | None = None
    ranks: Mapping[str, int] | None = None
    format: str = ""


@dataclass(frozen=True)
class Release:
    """What a client receives.

    Attributes:
        version: The round whose aggregate this is; 0 before the first.
        trainable: What the client continues from, at its own scale. A module's rank may be below what the client
            trains: the remaining slots start fresh.
        frozen: A part that rides beside the trainable one, in factors of scale 1. It replaces what the client
            holds, or is added to it where `frozen_since` names the version that the client holds.
        train: Which factors the client trains. Where it is one, each part holds one factor or none, see `sides`: `trainable` the
            factor that moved last, and `frozen` the other, the same bytes as `trainable` of the version before.
        frozen_since: Version to which `frozen` is an addition, or None.
        keep_frozen: Whether later releases may add to the frozen part, so that the client must keep it.
    """

    version: int
    trainable: Adapter
    frozen: Adapter | None = None
    train: Trainable = "AB"
    frozen_since: int | None = None
    keep_frozen: bool = False


@dataclass(frozen=True)
class Update:
    """What a client sends back. Every field is under the signature in a deployment.

    Attributes:
        run_id: The run it belongs to.
        round: From 1.
        client_id: Who sends it.
        parent_release_hash: SHA-256 (hex) of the encoded release that training started from.
        adapter: The trained adapter (not the change), at the client's own scale and rank; where one factor is trained, that
            one alone.
        num_examples: Examples in the client's training set.
        metrics: Numbers about the training, such as `train_loss`.
        privacy: What the client's mechanism did, or None.
        signature: Ed25519 over all of the above; empty in memory.
    """

    run_id: str
    round: int
    client_id: str
    parent_release_hash: str
    adapter: Adapter = EMPTY
    num_examples: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    privacy: Mapping[str, float] | None = None
    signature: bytes = b""


@dataclass(frozen=True)
class Rejection:
    """An update that was not admitted. Counted and reported; never stops a run.

    Attributes:
        client_id: Who sent it.
        reason: A short code: see `server.admission`.
        message: Expected, got, and what the client should change.
        final: Whether the client is done with the round; otherwise it may still send what it should.
    """

    client_id: str
    reason: str
    message: str = ""
    final: bool = True


@dataclass(frozen=True)
class Instruction:
    """What the coordinator asks of one client in one round.

    Attributes:
        run_id: The run.
        round: From 1; for an evaluation the round whose aggregate is measured, 0 for the base.
        client_id: The client asked.
        release: Encoded trainable part.
        frozen: Encoded frozen part, or None.
        version: Version of the release.
        frozen_since: See `Release`.
        keep_frozen: See `Release`.
        train: See `Release`.
        kind: To train from the release and send an update, or to measure it on held-out text and report.
    """

    run_id: str
    round: int
    client_id: str
    release: Blob
    frozen: Blob | None
    version: int
    frozen_since: int | None = None
    keep_frozen: bool = False
    train: Trainable = "AB"
    kind: Kind = "train"

    @property
    def release_hash(self) -> str:
        """What the update names as its parent: SHA-256 (hex) over the hashes of the release's parts."""
        return sha256(f"{self.release.sha256}|{self.frozen.sha256 if self.frozen else ''}".encode())

    @property
    def num_bytes(self) -> int:
        """Length of the release, both parts."""
        return self.release.num_bytes + (self.frozen.num_bytes if self.frozen else 0)


@dataclass(frozen=True)
class Reply:
    """What came back from one client: an encoded update, figures, or the code of what went wrong at the client.

    Attributes:
        client_id: Who replies.
        update: Encoded update, or None.
        failure: A scrubbed code and sentence where there is neither update nor figures.
        figures: Of an evaluation: `nats`, `targets`, `hits`.
        trained: Whether the client has its update ready for a secure sum, and keeps it.
    """

    client_id: str
    update: Blob | None
    failure: str = ""
    figures: Mapping[str, float] | None = None
    trained: bool = False
