"""What a site or a coordinator is given as files, before anything is started with them: each with what to do."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from lamina.client.doctor import Line
from lamina.client.hardware import size
from lamina.client.policy import Policy, read
from lamina.client.private import ledger as ledgers
from lamina.client.rows import glance
from lamina.protos import spec as specs
from lamina.protos.config import Config, DataConfig, PrivacyConfig
from lamina.protos.errors import BudgetSpent, ConfigError, LaminaError
from lamina.protos.privacy.accounting import epsilon


def settings_of(path: Path) -> tuple[Config, Mapping[str, str]]:
    """What a settings file of a site or a coordinator names.

    Args:
        path: The file.

    Returns:
        All of it, and what is to be looked at, by the doctor's own names.

    Raises:
        ConfigError: If it cannot be read, or a key or value is impossible.
    """
    from lamina.protos import compose  # with Hydra, which nothing else here needs

    keys = compose.keys_of(["--config", str(path)])
    config = compose.composed([], path)
    insecure = str(config.insecure).lower()
    if any(key.startswith("coordinator.") for key in keys):
        hub = config.coordinator
        looked = {"identity": hub.identity, "listen": hub.listen, "spec": hub.spec, "revocations": hub.revocations}
        return config, looked | {"insecure": insecure}
    site = config.client
    looked = {name: str(getattr(site, name)) for name in ("identity", "coordinator", "policy", "state", "revocations")}
    return config, looked | {"data": config.data.source, "model": config.model.source, "insecure": insecure}


def text(config: DataConfig) -> Iterator[Line]:
    """Whether a site's text is there and has a row.

    Args:
        config: Where it is.

    Yields:
        One finding.
    """
    try:
        glance(config)
    except LaminaError as error:
        yield Line("FAIL", "data", str(error))
    else:
        yield Line("ok", "data", f"{config.source} has rows.")


def ledger(folder: Path, policy: Path | None) -> Iterator[Line]:
    """What the site's privacy ledger says was spent, where there is one.

    Args:
        folder: `client.state`.
        policy: The site's policy file, for what may be spent in all.

    Yields:
        At most one finding.
    """
    if not (folder / ledgers.FILE_NAME).exists():
        return
    try:
        found, floor = ledgers.opened(folder), read(policy).privacy
    except BudgetSpent as error:
        yield Line("FAIL", "privacy", str(error))
        return
    except ConfigError:
        return  # told of the policy
    target_delta = floor.total_delta or floor.max_delta or PrivacyConfig().delta
    spent, runs = epsilon(found.events(), target_delta), len(ledgers.runs_of(found))
    said = f"{found.path}: {len(found.charges)} charges of {runs} run{'' if runs == 1 else 's'}, "
    said += f"epsilon {spent:.4g} at delta {target_delta:g} in all"
    if floor.total_epsilon is not None:
        said += f" of {floor.total_epsilon:g}, {max(0.0, floor.total_epsilon - spent):.4g} left"
    yield Line("ok", "privacy", f"{said}. Keep the file with the data, and never restore an older copy.")


def schema(path: Path) -> Iterator[Line]:
    """Whether a coordinator's schema file can be read.

    Args:
        path: The file.

    Yields:
        One finding.
    """
    try:
        found = specs.read(path)
    except LaminaError as error:
        yield Line("FAIL", "spec", str(error))
    else:
        yield Line("ok", "spec", f"{path} is the schema of {found.base_model}, {len(found.modules)} modules.")


def base(folder: Path) -> Iterator[Line]:
    """Whether a folder holds a base model that can be loaded without running its code.

    Args:
        folder: From `model.source`.

    Yields:
        One finding.
    """
    if not (folder / "config.json").is_file():
        yield Line("FAIL", "model", f"{folder}: expected a model's folder, found no config.json. Set model=DIR.")
    elif not any(folder.glob("*.safetensors")):
        pickled = sorted(one.name for pattern in ("*.bin", "*.pt") for one in folder.glob(pattern))
        got = f"only {pickled[0]}, a pickle, which is not loaded" if pickled else "none"
        yield Line(
            "FAIL", "model", f"{folder}: expected weights as *.safetensors, got {got}. Convert them where it is safe."
        )
    else:
        num_bytes = sum(one.stat().st_size for one in folder.glob("*.safetensors"))
        told = f"{folder}: {size(num_bytes)} of safetensors. `lamina spec {folder}` gives its hashes, for the policy."
        yield Line("ok", "model", told)


def policy(path: Path) -> Iterator[Line]:
    """Whether the site's policy can be read, and who could change it.

    Args:
        path: The file.

    Yields:
        Findings.
    """
    try:
        found = read(path)
    except ConfigError as error:
        yield Line("FAIL", "policy", str(error))
        return
    same = " It is the default policy." if found == Policy() else ""
    yield Line("ok", "policy", f"{path} can be read.{same}")
    if os.name == "posix" and path.stat().st_mode & 0o022:
        told = (
            f"{path} can be changed by others than its owner, and so can what this site gives away. chmod go-w {path}"
        )
        yield Line("warn", "policy", told)
