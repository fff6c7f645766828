"""A quantised copy of a base on the site's own disk, with a manifest that says of which base it is and what its files hold.

A site that has no memory for the full-precision weights cannot hash them: it takes the manifest's word for the base's hash, and
its policy says whose word that may be.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lamina.protos.config import FORMATS
from lamina.protos.errors import ConfigError
from lamina.protos.files import file_digest, sha256, write_atomic

MANIFEST = "lamina-quantised.json"
COMPENSATION = "compensation.safetensors"
_SCHEMA = 1
COMPUTES = ("fp32", "bf16", "fp16")
_HASH = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Manifest:
    """What a copy says of itself.

    Attributes:
        format: Number format of the linear layers.
        compute: Of activations and of what is not quantised.
        base_model: Name of the full-precision base.
        base: Its hashes: `weights`, `config`, `tokenizer`, `chat_template`.
        versions: Of the libraries that made it.
        files: Name -> SHA-256.
        formats: Module -> format, of a mixed copy.
        compensation: Rank of the compensation factors, 0 for none.
        digest: SHA-256 of the manifest itself, by which a policy names it.
    """

    format: str
    compute: str
    base_model: str
    base: Mapping[str, str]
    versions: Mapping[str, str]
    files: Mapping[str, str]
    formats: Mapping[str, str] = field(default_factory=dict)
    compensation: int = 0
    digest: str = ""


def write_manifest(folder: Path, manifest: Manifest) -> Manifest:
    """Hash the files of a copy and write its manifest, last.

    Args:
        folder: Of the copy.
        manifest: Without files.

    Returns:
        The manifest as it is on disk.

    Raises:
        OSError: If the disk does not take it.
    """
    files = {
        path.relative_to(folder).as_posix(): file_digest(path).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    document = {
        "schema": _SCHEMA,
        "format": manifest.format,
        "compute": manifest.compute,
        "base_model": manifest.base_model,
        "base": dict(manifest.base),
        "versions": dict(manifest.versions),
        "formats": dict(manifest.formats),
        "compensation": manifest.compensation,
        "files": files,
    }
    write_atomic(folder / MANIFEST, json.dumps(document, indent=1, sort_keys=True).encode())
    return read(folder)


def read_manifest(source: str) -> Manifest | None:
    """The manifest of a copy, its files not looked at.

    Args:
        source: What `model.source` resolved to.

    Returns:
        None where it is no quantised copy.

    Raises:
        ConfigError: If there is a manifest that cannot be read.
    """
    folder = Path(source)
    return read(folder) if (folder / MANIFEST).is_file() else None


def read(folder: Path) -> Manifest:
    """The manifest of a copy.

    Args:
        folder: Of the copy.

    Returns:
        What it says.

    Raises:
        ConfigError: If it is not one of this version's.
    """
    path = folder / MANIFEST
    content = path.read_bytes()
    try:
        document = json.loads(content)
        if document["schema"] != _SCHEMA:
            raise ConfigError(f"{path}: expected schema {_SCHEMA}, got {document['schema']!r}. Make the copy again.")
        texts = {name: _texts(document[name]) for name in ("base", "versions", "files", "formats")}
        _check_values(document, texts)
        return Manifest(
            format=str(document["format"]),
            compute=str(document["compute"]),
            base_model=str(document["base_model"]),
            base=texts["base"] | {"weights": texts["base"]["weights"], "config": texts["base"]["config"]},
            versions=texts["versions"],
            files=texts["files"],
            formats=texts["formats"],
            compensation=int(document["compensation"]),
            digest=sha256(content),
        )
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise ConfigError(
            f"{path}: expected a manifest as `lamina quantise` writes it, got {type(error).__name__}. Make the copy again."
        ) from None


def _check_values(document: Mapping[str, Any], texts: Mapping[str, Mapping[str, str]]) -> None:
    """Raise ValueError unless every value is one that a manifest can have."""
    right = (
        document["format"] in FORMATS and document["compute"] in COMPUTES and isinstance(document["base_model"], str)
    )
    right &= set(texts["formats"].values()) <= set(FORMATS)
    right &= all(_HASH.fullmatch(one) is not None for one in (*texts["base"].values(), *texts["files"].values()))
    right &= type(document["compensation"]) is int and 0 <= document["compensation"] < 2**20
    if not right:
        raise ValueError("a value that is none")


def _texts(found: Any) -> dict[str, str]:
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise TypeError("expected texts")
    return dict(found)


def check_files(folder: Path, manifest: Manifest) -> None:
    """Raise unless a copy's files are those of its manifest.

    Args:
        folder: Of the copy.
        manifest: Of it.

    Raises:
        ConfigError: If one is missing, changed, or more.
    """
    present = {
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST
    }
    for name in sorted(present ^ manifest.files.keys()):
        what = "the file is missing" if name in manifest.files else "a file that the manifest does not know"
        raise ConfigError(f"{folder / name}: expected the files of {MANIFEST}, got {what}. Make the copy again.")
    for name, expected in manifest.files.items():
        got = file_digest(folder / name).hexdigest()
        if got != expected:
            raise ConfigError(
                f"{folder / name}: expected SHA-256 {expected[:12]}… of {MANIFEST}, got {got[:12]}…. Make the copy again."
            )
