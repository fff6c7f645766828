"""Encoded bytes named by their content, in memory or in a file. What travels and what is stored is a blob."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lamina.protos.files import sha256 as digest


@dataclass(frozen=True, repr=False)
class Blob:
    """Some bytes and their name.

    Attributes:
        sha256: Of the content, hex.
        num_bytes: Its length.
        content: The bytes themselves, or the file that holds them.
    """

    sha256: str
    num_bytes: int
    content: bytes | Path

    def read(self) -> bytes:
        """All bytes, from wherever they are."""
        return self.content if isinstance(self.content, bytes) else self.content.read_bytes()

    def __repr__(self) -> str:
        return f"Blob({self.sha256[:12]}, {self.num_bytes} bytes)"


def blob(content: bytes) -> Blob:
    """A blob in memory.

    Args:
        content: Any bytes.

    Returns:
        The blob.
    """
    return Blob(digest(content), len(content), content)
