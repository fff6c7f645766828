"""Reconstruction in a scene, as audit.json has it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lamina.audits.reconstruction import attack
from lamina.audits.scene import Scene
from lamina.audits.settings import Settings


def rebuilt(found: Scene, settings: Settings, progress: Callable[[int, int], None]) -> dict[str, Any]:
    """What each party could rebuild of the text.

    Args:
        found: Any scene.
        settings: For the size.
        progress: Told how much is done.

    Returns:
        `reconstruction` of audit.json; empty where no updates can be looked at.
    """
    if found.origin == "not kept" or not found.run.kept:
        return {}
    how = attack.QUICK if settings.quick else attack.Settings(seed=found.config.seed)
    base, examples = found.prepared.base, found.prepared.train
    result = attack.reconstruct(found.run.path, found.config, base, examples, how, progress)
    return attack.document(result)
