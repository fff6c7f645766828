"""One word for an audit, with its reasons."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lamina.audits.mechanism import Check

NO_CLAIM, CONSISTENT, VIOLATED, UNDER_POWERED = "no-claim", "consistent", "violated", "under-powered"


def verdict(
    claim: Mapping[str, Any] | None, checks: Sequence[Check], one_run: Mapping[str, Any] | None
) -> tuple[str, list[str]]:
    """Whether a claim holds against everything that was measured.

    Args:
        claim: `epsilon` and `delta`, or None.
        checks: Of the mechanism.
        one_run: Bounds and ceilings, or None where nothing was scored that the claim is about.

    Returns:
        `no-claim`; `violated` where a check fails or a bound is above the claim; `under-powered` where no bound could have been
        above it; otherwise `consistent`. And why, in sentences.
    """
    if claim is None or claim.get("epsilon") is None:
        return NO_CLAIM, [
            "The run claims no epsilon, so there is none to refute. What was measured shows what it leaks."
        ]
    epsilon = float(claim["epsilon"])
    reasons = [
        f"{check.name}: expected {check.expected}; measured {check.measured}."
        for check in checks
        if check.holds is False
    ]
    if one_run is not None:
        names = {
            "epsilon_lower": "The (epsilon, delta) bound of the one-run test",
            "epsilon_lower_fdp": "The one-run bound for Gaussian mechanisms",
        }
        reasons += [
            f"{text} is {one_run[key]:.3g}, above the claimed {epsilon:.3g}, at significance {one_run['significance']:g}."
            for key, text in names.items()
            if one_run[key] is not None and one_run[key] > epsilon
        ]
    if reasons:
        return VIOLATED, reasons
    held = sum(check.holds is True for check in checks)
    looked = (
        f"{held} of {len(checks)} checks of the mechanism hold, the others could not be made."
        if held < len(checks)
        else (f"All {held} checks of the mechanism hold." if held else "No check of the mechanism could be made.")
    )
    if any(check.name == "accounting" and check.holds is None for check in checks):
        return UNDER_POWERED, ["What the run cost could not be computed anew: it left no events.", looked]
    if one_run is None and any(check.name == "client canaries" for check in checks):
        return CONSISTENT, [
            "Canary clients show no more than the claim of a client; theirs is an estimate, no bound.",
            looked,
        ]
    if one_run is None:
        return UNDER_POWERED, ["No canary or record was scored against the claim.", looked]
    highest = max(one for one in (one_run["ceiling"], one_run["ceiling_fdp"]) if one is not None)
    found = [f"{one_run[key]:.3g}" for key in ("epsilon_lower", "epsilon_lower_fdp") if one_run[key] is not None]
    bounds = f"the bounds are {' and '.join(found)}"
    if highest < epsilon:
        return UNDER_POWERED, [
            f"With {one_run['guesses']} guesses no bound can exceed {highest:.3g}, so a claim of {epsilon:.3g} cannot be refuted "
            f"by them; {bounds}. More canaries raise the ceiling.",
            looked,
        ]
    return CONSISTENT, [
        f"Nothing that was measured is beyond the claim of {epsilon:.3g}: {bounds}, where up to {highest:.3g} could have been "
        "shown.",
        looked,
    ]
