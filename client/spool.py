"""What a site keeps on disk so that nothing is lost: the last finished update with the client's state after it, releases that
were fetched, the round that was trained last, and the heads of the coordinator's log that this site has seen.

An update and the state that follows from it appear together, before the update is sent. After a kill the update is offered
again; it is never trained twice from a state that has moved on.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lamina.protos.blobs import Blob
from lamina.protos.chain import Head, witness_heads, witness_line
from lamina.protos.errors import CheckpointError, ConfigError
from lamina.protos.files import append_durably, sha256, write_atomic, write_folder

_SHOWN, _VECTOR = "shown.json", "masked"
_UPDATE, _META, _SENT, _TRAINED, _PLAN = "update.safetensors", "meta.json", "sent", "trained.txt", "plan.json"


@dataclass(frozen=True)
class Finished:
    """The last finished update.

    Attributes:
        round: That it was trained in.
        parent: Hash of the release that it started from.
        version: Of that release: what the client holds now.
        update: The encoded update.
        state: Name -> content of the client's state after it.
        charge: The line of the site's privacy ledger that paid for it; None where nothing is private.
    """

    round: int
    parent: str
    version: int
    update: Blob
    state: Mapping[str, bytes]
    charge: Head | None = None


@dataclass(frozen=True)
class Spool:
    """One run's folder at a site.

    Attributes:
        root: The folder.
    """

    root: Path

    @property
    def releases(self) -> Path:
        """Where fetched releases lie."""
        return self.root / "releases"

    def save(self, finished: Finished) -> Finished:
        """Keep an update in place of the one before; on disk when this returns.

        Args:
            finished: With the update's content in memory.

        Returns:
            The same, with the update in its file.
        """
        folder = self._folder(finished)
        write_atomic(self.root / _TRAINED, f"{finished.round} {finished.parent}\n")
        files = {f"state/{name}": content for name, content in finished.state.items()}
        hashes = {name: sha256(content) for name, content in files.items()} | {_UPDATE: finished.update.sha256}
        files[_UPDATE] = finished.update.read()
        meta = {
            "round": finished.round,
            "parent": finished.parent,
            "version": finished.version,
            "sha256": hashes,
            "charge": finished.charge and [finished.charge.n, finished.charge.hash],
        }
        write_folder(folder, files | {_META: json.dumps(meta).encode()})
        for older in self.root.glob("finished-*"):
            if older != folder:
                shutil.rmtree(older, ignore_errors=True)
        return replace(finished, update=replace(finished.update, content=folder / _UPDATE))

    def _folder(self, finished: Finished) -> Path:
        return self.root / f"finished-{finished.round:06d}"

    def trained(self) -> tuple[int, str]:
        """The round that was trained last and its release's hash, also where the update is gone by now; 0 for none."""
        path = self.root / _TRAINED
        if not path.exists():
            return 0, ""
        try:
            number, parent = path.read_text().split()
            return int(number), parent
        except (OSError, ValueError):
            raise CheckpointError(
                f"{path}: expected the round that was trained last. Remove the run's folder; it gets everything again."
            ) from None

    def plan(self) -> Mapping[str, Any] | None:
        """What `keep_plan` wrote, None where there is nothing whole: then the site is sized anew."""
        try:
            found = json.loads((self.root / _PLAN).read_text())
        except (OSError, ValueError, RecursionError):
            return None
        return found if isinstance(found, dict) else None

    def keep_plan(self, kept: Mapping[str, Any]) -> None:
        """Keep what the site was sized to, so that it asks for the same when it is started again."""
        self.root.mkdir(parents=True, exist_ok=True)
        write_atomic(self.root / _PLAN, json.dumps(dict(kept), indent=1))

    def accepted(self, finished: Finished) -> None:
        """The coordinator has the update; where that cannot be noted, the update stays longer."""
        with contextlib.suppress(OSError):
            (self._folder(finished) / _SENT).touch()

    def clear(self) -> None:
        """Remove the update that the coordinator has, and what was fetched; what was trained and witnessed is remembered."""
        self.sweep(set())
        for sent in self.root.glob(f"finished-*/{_SENT}"):
            shutil.rmtree(sent.parent, ignore_errors=True)

    def load(self) -> Finished | None:
        """The last finished update, every file checked, or None; `CheckpointError` if a disk has changed it."""
        folders = sorted(self.root.glob("finished-*"))
        return self._loaded(folders[-1]) if folders else None

    def _loaded(self, folder: Path) -> Finished:
        try:
            meta = json.loads((folder / _META).read_text())
            contents = {name: (folder / name).read_bytes() for name in meta["sha256"]}
            wrong = [name for name, content in contents.items() if sha256(content) != meta["sha256"][name]]
            if wrong:
                raise ValueError(f"another content in {wrong[0]}")
            update = contents.pop(_UPDATE)
            state = {name.removeprefix("state/"): content for name, content in contents.items()}
            blob = Blob(meta["sha256"][_UPDATE], len(update), folder / _UPDATE)
            charge = meta.get("charge") and Head(*meta["charge"])
            return Finished(meta["round"], meta["parent"], meta["version"], blob, state, charge)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{folder}: expected the last finished update, got {error}. Remove that folder; its round is trained again."
            ) from None

    def sweep(self, keep: set[str]) -> None:
        """Delete fetched releases that are not to be kept."""
        for path in self.releases.glob("*"):
            if path.name.removesuffix(".part") not in keep:
                path.unlink(missing_ok=True)

    def shown(self, round_number: int) -> tuple[str, ...]:
        """The clients whose sum this site has helped to show in a round; empty for none."""
        path = self.root / _SHOWN
        if not path.exists():
            return ()
        try:
            about, *names = json.loads(path.read_text())
            if type(about) is not int or not all(isinstance(name, str) for name in names):
                raise ValueError("something else")
        except (OSError, ValueError, TypeError, RecursionError):
            raise CheckpointError(
                f"{path}: expected whose sum this site has helped to show. Move it away, and leave the open round out: stop this "
                "agent until it is over."
            ) from None
        return tuple(names) if about == round_number else ()

    def show(self, round_number: int, names: tuple[str, ...]) -> None:
        """Remember whose sum is about to be shown; on disk when this returns."""
        self.root.mkdir(parents=True, exist_ok=True)
        write_atomic(self.root / _SHOWN, json.dumps([round_number, *names]))

    def vector(self, content: bytes) -> Blob:
        """Keep a masked vector while it is sent."""
        path = self.root / _VECTOR
        self.root.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return Blob(sha256(content), len(content), path)

    def witnessed(self) -> Head | None:
        """The last head of the coordinator's log that this site has countersigned, or None."""
        path = self.root / "witness.txt"
        if not path.exists():
            return None
        try:
            text = path.read_text()
            heads = witness_heads(text[: text.rfind("\n") + 1], str(path))
        except (OSError, UnicodeDecodeError, ConfigError) as error:
            raise CheckpointError(
                f"{path}: expected the heads of the coordinator's log that this site has seen, got a file that cannot be read "
                f"({error}). Move it away and keep it for the auditor; the next head begins a new one."
            ) from None
        return heads[-1] if heads else None

    def witness(self, head: Head) -> None:
        """Remember a head; `lamina log verify … witness=` reads the file."""
        self.root.mkdir(parents=True, exist_ok=True)
        append_durably(self.root / "witness.txt", witness_line(head))


def clear_others(folder: Path, run_id: str) -> None:
    """Clear what runs before this one have left in a site's folder; an update that was not accepted stays.

    Args:
        folder: With a folder a run.
        run_id: Of the run that begins.
    """
    for trained in folder.glob(f"*/{_TRAINED}"):
        if trained.parent.name != run_id:
            Spool(trained.parent).clear()


def charged_heads(folder: Path) -> list[Head]:
    """The lines of the site's privacy ledger that paid for the updates that are kept, of any run.

    Args:
        folder: With a folder a run.

    Returns:
        Them; an update that cannot be read is left out, as it is not sent either.
    """
    found = []
    for path in sorted(folder.glob(f"*/finished-*/{_META}")):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
            number, digest = json.loads(path.read_text())["charge"]
            found.append(Head(int(number), str(digest)))
    return found


def newest(folder: Path) -> tuple[str, int]:
    """The run of the last finished update in a site's folder, and the version that the client holds since.

    Args:
        folder: With a folder a run.

    Returns:
        Run id and version; an empty name and -1 where there is nothing whole.
    """
    found = sorted(folder.glob(f"*/finished-*/{_META}"), key=lambda path: path.stat().st_mtime)
    if not found:
        return "", -1
    try:
        return found[-1].parent.parent.name, int(json.loads(found[-1].read_text())["version"])
    except (OSError, ValueError, KeyError, TypeError):
        return "", -1
