"""Reconstruction in a scene, as audit.json has it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from lamina.audits import views
from lamina.audits.reconstruction import attack
from lamina.audits.reconstruction.attack import Result
from lamina.audits.scene import Scene
from lamina.audits.settings import Settings


def rebuilt(
    found: Scene, settings: Settings, progress: Callable[[int, int], None], invented: bool = True
) -> dict[str, Any]:
    """What each party could rebuild of the text.

    Args:
        found: Any scene.
        settings: For the size.
        progress: Told how much is done.
        invented: Whether a coordinator that prepared the base is simulated, too, on invented notes.

    Returns:
        `reconstruction` of audit.json; empty where no updates can be looked at. In a deployment it is of the one site whose
        rows are here.
    """
    if found.origin == "not kept" or not found.run.kept:
        return {}
    how = attack.QUICK if settings.quick else attack.Settings(seed=found.config.seed)
    if not invented:
        how = replace(how, scenario=None)
    base, examples, own = found.prepared.base, found.prepared.train, found.own_client
    if own and found.config.privacy.mode == "example-dp":
        why = "which rows a site's steps drew is that site's secret and kept nowhere, so it is not known what would be right"
        return attack.document({view: attack.Result(False, why) for view in (*views.PARTIES, attack.MALICIOUS)})
    if how.scenario is not None and found.config.privacy.mode == "example-dp":
        noise, clip = found.noise_multiplier(), found.config.train.max_grad_norm
        how = replace(how, scenario=replace(how.scenario, noise_multiplier=noise, max_grad_norm=clip))
    result = attack.reconstruct(found.run.path, found.config, base, examples, how, progress, own)
    result = _without_noised(result) if found.config.privacy.mode == "client-dp" else result
    return attack.document({view: one for view, one in result.items() if invented or view != attack.MALICIOUS})


def _without_noised(result: Mapping[str, Result]) -> dict[str, Result]:
    """Under client-dp only the coordinator sees anything without noise: what was run without it says nothing of the others."""
    why = "it sees only means with the coordinator's noise; see the canary clients"
    return {
        view: one if view in ("coordinator", attack.MALICIOUS) else attack.Result(False, why)
        for view, one in result.items()
    }
