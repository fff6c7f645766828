"""Who takes part: sites that have registered, what they can hold, when they were last heard of, and whom a round may ask."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from lamina.protos.clock import Clock
from lamina.protos.config import Config, client_names, per_client
from lamina.protos.errors import ConfigError, LaminaError, QuorumNotReached
from lamina.protos.identity import peer_of
from lamina.protos.messages import Budget, Wish
from lamina.protos.spec import AdapterSpec
from lamina.server.campaign import budget
from lamina.server.port.access import Access, Caller
from lamina.server.port.enrollment import TokenBucket
from lamina.server.port.mailbox import Mailbox
from lamina.server.store.deployment import DeploymentStore

# Registrations that change something go into the log: a client may make so many at once, and so many a second in the long run.
_CHANGES, _CHANGES_PER_S = 12, 0.05
# Asking for terms changes nothing, but they are signed anew each time.
_ASKS, _ASKS_PER_S = 60, 1.0


class Hasty(LaminaError):
    """A client registers anew too often."""


@dataclass(frozen=True)
class Seen:
    """What a client last said of itself.

    Attributes:
        at: When, on the clock's monotonic scale.
        round: That it trains, 0 for none.
        step: Of that training.
    """

    at: float
    round: int = 0
    step: int = 0


class Roster:
    """The clients of a deployment.

    Args:
        config: Names, ranks, waits.
        spec: For budgets.
        store: Where registrations are durable.
        clock: For silences.
    """

    def __init__(self, config: Config, spec: AdapterSpec, store: DeploymentStore, clock: Clock) -> None:
        self._config, self._spec, self._store, self._clock = config, spec, store, clock
        ranks = per_client(config.clients.ranks, config.clients.count, "clients.ranks")
        self.offered = dict(zip(client_names(config), ranks, strict=True))
        joins = per_client(config.clients.join_round, config.clients.count, "clients.join_round")
        self._joins = dict(zip(client_names(config), joins, strict=True))
        self._seen: dict[str, Seen] = {}
        self._lock = threading.Lock()
        self._began = clock.monotonic()
        self._budgets: dict[tuple[int, str], Budget] = {}
        self._changes = {name: TokenBucket(_CHANGES, _CHANGES_PER_S, clock.monotonic) for name in self.offered}
        self._asks = {name: TokenBucket(_ASKS, _ASKS_PER_S, clock.monotonic) for name in self.offered}
        self._within = set(self.registered())

    def register(self, caller: Caller, wish: Wish, held: int, equal_ranks: bool) -> Budget:
        """Take a client in, or take it up again.

        Args:
            caller: Who.
            wish: What it wants to train, and on what.
            held: Version of the release that it holds, -1 for none.
            equal_ranks: Whether the strategy needs one rank.

        Returns:
            Its budget.

        Raises:
            ConfigError: If that is more than the client may train.
            Hasty: If the client changes what it said too often.
        """
        found = self._offer(caller.name, wish, equal_ranks)
        self._remember(caller, wish, held)
        self._within.add(caller.name)
        self.saw(caller.name)
        return found

    def ask(self, client_id: str, wish: Wish, equal_ranks: bool) -> Budget:
        """What a client would hold if it registered so; nothing is remembered.

        Args:
            client_id: Who.
            wish: What it wants to train.
            equal_ranks: Whether the strategy needs one rank.

        Returns:
            The budget.

        Raises:
            ConfigError: If that is more than the client may train.
            Hasty: If the client asks too often.
        """
        if not self._asks[client_id].take():
            raise Hasty(f"client {client_id}: asked for the terms too often. Wait a minute.")
        return self._offer(client_id, wish, equal_ranks)

    def _offer(self, client_id: str, wish: Wish, equal_ranks: bool) -> Budget:
        """The same, however often."""
        offered = self.offered[client_id]
        chosen = offered if wish.rank is None else wish.rank
        if equal_ranks and wish.ranks is not None:
            raise ConfigError(
                f"client {client_id}: expected rank {offered} in every module, as the strategy needs, got ranks by module."
            )
        if chosen > offered or (equal_ranks and chosen != offered):
            bound = "exactly" if equal_ranks else "at most"
            raise ConfigError(
                f"client {client_id}: expected {bound} rank {offered}, got lora.rank={chosen}. "
                f"Set lora.rank={offered} at the site, or raise clients.ranks at the coordinator."
            )
        return self._budget(chosen, _text(wish.ranks))

    def _remember(self, caller: Caller, wish: Wish, held: int) -> None:
        certificate, ranks = caller.certificate.decode(), _text(wish.ranks)
        rank = self.offered[caller.name] if wish.rank is None else wish.rank
        row = (rank, ranks, wish.format, 1, certificate)
        known = self._store.db.rows(
            "SELECT rank, ranks, format, present, certificate FROM clients WHERE client_id = ?", caller.name
        )
        if known != [row] and not self._changes[caller.name].take():
            raise Hasty(f"client {caller.name}: registered with changes too often. Wait a minute.")
        with self._store.db.change() as connection:
            connection.execute(
                "INSERT INTO clients (client_id, rank, ranks, format, held, present, certificate) VALUES (?, ?, ?, ?, ?, 1, ?) "
                "ON CONFLICT (client_id) DO UPDATE SET rank = excluded.rank, ranks = excluded.ranks, format = excluded.format, "
                "held = excluded.held, present = 1, certificate = excluded.certificate",
                (caller.name, rank, ranks, wish.format, held, certificate),
            )
            if known != [row]:
                told = {"rank": rank, "ranks": wish.ranks and dict(wish.ranks), "format": wish.format or None}
                self._store.log(connection, "register", client_id=caller.name, certificate=certificate, **told)
        self._store.mirror()

    def signing_key(self, client_id: str) -> bytes | None:
        """The key of the certificate that a client registered with, None without one."""
        found = self._store.db.rows("SELECT certificate FROM clients WHERE client_id = ?", client_id)
        return peer_of(found[0][0].encode()).signing_key if found and found[0][0] else None

    def revoked(self, access: Access) -> list[str]:
        """Those whose certificate was revoked after they registered with it."""
        found = self._store.db.rows("SELECT client_id, certificate FROM clients WHERE certificate != ''")
        return [name for name, pem in found if access.is_revoked_serial(peer_of(pem.encode()).serial)]

    def takes_part(self, client_id: str) -> bool:
        """Whether a client has registered and not left since."""
        return client_id in self._within

    def gone(self, access: Access) -> dict[str, str]:
        """Sites that the run names and that are not in it now: `left`, `revoked`, or `absent` as they never came."""
        found = dict(self._store.db.rows("SELECT client_id, certificate FROM clients WHERE NOT present"))
        why = {name: "absent" for name in self.offered if name not in self.known()}
        for name, certificate in found.items():
            revoked = certificate and access.is_revoked_serial(peer_of(certificate.encode()).serial)
            why[name] = "revoked" if revoked else "left"
        return dict(sorted(why.items()))

    def leave(self, client_id: str) -> bool:
        """The client takes no part in later rounds, until it registers again; False if it had left before."""
        if client_id not in self._within:
            return False
        with self._store.db.change() as connection:
            found = connection.execute("UPDATE clients SET present = 0 WHERE client_id = ? AND present", (client_id,))
            if found.rowcount:
                self._store.log(connection, "leave", client_id=client_id)
        self._store.mirror()
        self._within.discard(client_id)
        return True

    def saw(self, client_id: str, round_number: int = 0, step: int = 0) -> None:
        """A sign of life."""
        with self._lock:
            before = self._seen.get(client_id)
            if round_number == 0 and before is not None:
                self._seen[client_id] = replace(before, at=self._clock.monotonic())
            else:
                self._seen[client_id] = Seen(self._clock.monotonic(), round_number, step)

    def silent_s(self, client_id: str) -> float:
        """Seconds since a client was heard of; infinite if never in this process."""
        with self._lock:
            seen = self._seen.get(client_id)
        return float("inf") if seen is None else self._clock.monotonic() - seen.at

    def progress(self, client_id: str) -> tuple[int, int]:
        """Round and step that a client trains, as it last said."""
        with self._lock:
            seen = self._seen.get(client_id, Seen(0.0))
        return seen.round, seen.step

    def registered(self) -> dict[str, Budget]:
        """Everyone who is in the run now, with what it holds."""
        found = self._store.db.rows("SELECT client_id, rank, ranks FROM clients WHERE present ORDER BY client_id")
        return {client: self._budget(rank, ranks) for client, rank, ranks in found}

    def known(self) -> dict[str, Budget]:
        """Everyone who has ever registered."""
        found = self._store.db.rows("SELECT client_id, rank, ranks FROM clients ORDER BY client_id")
        return {client: self._budget(rank, ranks) for client, rank, ranks in found}

    def formats(self) -> dict[str, str]:
        """The number format of each client's base, of those who say it."""
        return dict(self._store.db.rows("SELECT client_id, format FROM clients WHERE format != '' ORDER BY client_id"))

    def _budget(self, rank: int, ranks: str) -> Budget:
        if (rank, ranks) not in self._budgets:
            if len(self._budgets) > 4 * len(self.offered):
                self._budgets.clear()  # of what clients asked for once
            chosen = json.loads(ranks) if ranks else None
            self._budgets[rank, ranks] = budget(self._config, self._spec, rank, chosen)
        return self._budgets[rank, ranks]

    def heard(self, within_s: float) -> dict[str, Budget]:
        """Those of the registered who were heard of lately."""
        return {client: one for client, one in self.registered().items() if self.silent_s(client) <= within_s}

    def missed(self, within_s: float) -> dict[str, Budget]:
        """Those who registered with an earlier process of the run and have not come back, for so long after a restart."""
        if self._clock.monotonic() - self._began > within_s:
            return {}
        return {client: one for client, one in self.registered().items() if self.silent_s(client) == float("inf")}

    def present(
        self, round_number: int, mailbox: Mailbox, held_back: Callable[[], bool], again: bool = False
    ) -> Mapping[str, Budget]:
        """Whom a round may ask; waits until enough are there.

        Args:
            round_number: From 1.
            mailbox: Whose wait an operator can end.
            held_back: Whether an operator has paused the run.
            again: Whether the round has missed its quorum before: who has not dialled since is not there.

        Returns:
            Client id -> budget.

        Raises:
            QuorumNotReached: If fewer than the quorum have come within `clients.deadline_s`.
        """
        clients = self._config.clients
        wanted = (clients.start or clients.count) if round_number == 1 else clients.quorum
        started = self._clock.monotonic()
        while True:
            patience = clients.patience_s
            if held_back():
                started = self._clock.monotonic()
            else:
                ready = {
                    client: one
                    for client, one in {**({} if again else self.missed(patience)), **self.heard(patience)}.items()
                    if self._joins.get(client, 1) <= round_number
                }
                waited = self._clock.monotonic() - started
                if len(ready) >= wanted or (waited > clients.deadline_s and len(ready) >= clients.quorum):
                    return ready
                if waited > clients.deadline_s:
                    raise QuorumNotReached(
                        f"round {round_number}: expected at least {clients.quorum} clients within "
                        f"{clients.deadline_s:g} s, {len(ready)} came. Start the sites' agents and then the coordinator "
                        "again, or lower clients.quorum; nothing is lost."
                    )
            mailbox.wait(0.2)


def _text(ranks: Mapping[str, int] | None) -> str:
    return "" if ranks is None else json.dumps(dict(ranks), sort_keys=True)
