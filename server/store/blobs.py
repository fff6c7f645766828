"""Content-addressed files: whole blobs under their SHA-256, and uploads that are not whole yet."""

from __future__ import annotations

import os
import secrets
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path

from lamina.protos.blobs import Blob
from lamina.protos.files import file_digest, fsync_folder, sha256
from lamina.protos.growing import Growing

_LARGE_BYTES, _PIECE_BYTES = 4 * 1024**2, 1024**2


@dataclass(frozen=True)
class BlobStore:
    """A folder of blobs.

    Attributes:
        root: The folder; `<ab>/<abcd…>` below it, and `partial/`.
    """

    root: Path

    def put(self, content: bytes) -> Blob:
        """Keep some bytes; what is there already is not written again."""
        if len(content) >= _LARGE_BYTES:
            return self._put_large(content)
        name = sha256(content)
        path = self._path(name)
        if not (path.is_file() and path.stat().st_size == len(content)):
            partial = self.root / "partial" / f"put-{name}"
            partial.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            return self.adopt(partial, name)
        return Blob(name, len(content), path)

    def _put_large(self, content: bytes) -> Blob:
        """Written, hashed and brought to disk side by side."""
        partial = self.root / "partial" / f"put-{secrets.token_hex(8)}"
        partial.parent.mkdir(parents=True, exist_ok=True)
        view = memoryview(content)
        with Growing(partial) as growing:
            for start in range(0, len(content), _PIECE_BYTES):
                growing.write(view[start : start + _PIECE_BYTES])
            name = growing.finish()
        return self.adopt(partial, name)

    def adopt(self, partial: Path, name: str) -> Blob:
        """Give a file that is whole and on disk its place under its name.

        Args:
            partial: The file; gone afterwards.
            name: Its SHA-256, which the caller has checked.

        Returns:
            The blob.
        """
        path = self._path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        os.replace(partial, path)
        fsync_folder(path.parent)
        return Blob(name, path.stat().st_size, path)

    def find(self, name: str) -> Blob | None:
        """A blob by its SHA-256, or None."""
        path = self._path(name)
        return Blob(name, path.stat().st_size, path) if path.is_file() else None

    def partial(self, round_number: int, client_id: str, name: str) -> Path:
        """Where one client's upload of a blob grows; what it began to upload before is given up."""
        folder = self.root / "partial"
        folder.mkdir(parents=True, exist_ok=True)
        stem = f"{round_number}-{client_id}-"
        for other in folder.iterdir():
            if other.name[: -len(name)] == stem and not other.name.endswith(name):
                other.unlink(missing_ok=True)
        return folder / f"{stem}{name}"

    def drop(self, name: str) -> None:
        """Delete a blob that nothing names any more."""
        self._path(name).unlink(missing_ok=True)

    def sweep(self, keep: Container[str], first_round: int) -> None:
        """Delete every blob that is not to be kept, and partial uploads for rounds before the first that is."""
        for path in self.root.glob("[0-9a-f][0-9a-f]/*"):
            if path.name not in keep:
                path.unlink(missing_ok=True)
        for path in (self.root / "partial").glob("*"):
            number = path.name.partition("-")[0]
            if not number.isdigit() or int(number) < first_round:
                path.unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        return self.root / name[:2] / name


def is_whole(blob: Blob) -> bool:
    """Whether a blob's content still has its name: a disk may have lost or changed it.

    Args:
        blob: In a file.

    Returns:
        False where the file is gone, cut or changed.
    """
    try:
        return file_digest(Path(str(blob.content))).hexdigest() == blob.sha256
    except OSError:
        return False
