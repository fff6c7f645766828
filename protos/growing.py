"""A file that grows by pieces while they arrive: written at once, hashed in one thread and brought to disk in another, so that
the hash costs no time of the network's and little is left to wait for at the end.
"""

from __future__ import annotations

import os
import queue
import threading
from pathlib import Path
from types import TracebackType

from lamina.protos.files import file_digest

_SYNC_BYTES = 16 * 1024**2
# Pieces that may wait for the hash: what arrives faster waits in the network.
_PIECES = 8


class Growing:
    """Append to a file, with its SHA-256 over all of it.

    Args:
        path: The file; what is there already counts.

    Attributes:
        size: Bytes in the file.
    """

    def __init__(self, path: Path) -> None:
        path.touch()
        self._digest = file_digest(path)
        self._file = path.open("ab", buffering=0)
        self.size = self._file.tell()
        self._unsynced = 0
        self._pieces: queue.Queue[bytes | memoryview | None] = queue.Queue(_PIECES)
        self._syncs: queue.Queue[bool] = queue.Queue(1)
        self._error: OSError | None = None
        self._threads = [
            threading.Thread(target=self._hash, daemon=True),
            threading.Thread(target=self._sync, daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> Growing:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()
        self._file.close()

    def write(self, piece: bytes | memoryview) -> None:
        """Append a piece; OSError if the disk does not take it."""
        view = memoryview(piece)
        while view:
            view = view[self._file.write(view) :]
        self._pieces.put(piece)
        self.size += len(piece)
        self._unsynced += len(piece)
        if self._unsynced >= _SYNC_BYTES and self._syncs.empty():
            self._unsynced = 0
            self._syncs.put(True)

    def finish(self) -> str:
        """Bring all of it to disk.

        Returns:
            SHA-256 in hex.

        Raises:
            OSError: If the disk did not take it.
        """
        self._stop()
        os.fsync(self._file.fileno())
        if self._error is not None:
            raise self._error
        return self._digest.hexdigest()

    def _stop(self) -> None:
        if self._threads:
            self._pieces.put(None)
            self._syncs.put(False)
            for thread in self._threads:
                thread.join()
            self._threads = []

    def _hash(self) -> None:
        while (piece := self._pieces.get()) is not None:
            self._digest.update(piece)

    def _sync(self) -> None:
        while self._syncs.get():
            try:
                os.fdatasync(self._file.fileno())
            except OSError as error:
                self._error = error
