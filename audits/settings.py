"""What an audit is asked to do, from the words of its command line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from lamina.protos.config import SHORTHANDS, known_keys
from lamina.protos.errors import ConfigError, nearest

# In the order in which they run and are reported.
PARTS = ("mechanism", "canaries", "membership", "reconstruction", "extraction", "novelty", "defences")
# The comparison of defences trains a model for each; it is asked for by name.
_STANDARD = tuple(part for part in PARTS if part != "defences")


@dataclass(frozen=True)
class Settings:
    """One audit.

    Attributes:
        run_dir: The finished run, or None for a campaign of the audit's own.
        output: Folder of `audit.json` and `audit.html`; None for the default.
        quick: Smaller sizes throughout; the formulas are the same.
        parts: Which of `PARTS`.
        canaries: Of a campaign, in and out together.
        rows: Of a campaign: rows of each client that are trained on beside the canaries; 0 for all.
        guesses: Of a one-run bound, half of them `in` and half `out`; fixed before anything is scored.
        examples: Rows scored for membership, trained on and held out, so many of each.
        shadows: Adapters trained for RMIA and LiRA.
        significance: Of every bound: it exceeds the truth in at most this share of audits.
        fail_on: `violated`, for exit code 4 on that verdict, or empty.
        identity: Folder of the auditor's certificate and keys, or empty for no signature.
        client: In a deployment's run, whose rows `data.source` has.
        show_text: Whether the report shows text of the audited data.
    """

    run_dir: Path | None = None
    output: Path | None = None
    quick: bool = False
    parts: tuple[str, ...] = _STANDARD
    canaries: int = 400
    rows: int = 200
    guesses: int = 200
    examples: int = 300
    shadows: int = 4
    significance: float = 0.05
    fail_on: str = ""
    identity: str = ""
    client: str = ""
    show_text: bool = True


HELP: Mapping[str, str] = {
    "output": "folder of audit.json and audit.html; default RUN_DIR/audit, or outputs/<date>/<time>-audit for a campaign",
    "parts": f"any of {','.join(PARTS)}; default all but defences",
    "canaries": "of a campaign: canaries made, of which a fair coin puts each in or out (400; quick 120)",
    "rows": "of a campaign: rows of each client that are trained on beside the canaries, 0 for all (200; quick 48)",
    "guesses": "guesses of the one-run bound, at most the canaries (200; quick 80)",
    "examples": "rows scored for membership, so many trained on and so many held out (300; quick 64)",
    "shadows": "shadow adapters of RMIA and LiRA (4; quick 2)",
    "significance": "share of audits in which a bound may exceed the truth (0.05)",
    "fail_on": "violated: exit code 4 where that is the verdict",
    "identity": "folder of an auditor's certificate and keys, from `lamina pki enroll`: signs audit.json",
    "client": "a deployment's run: the site whose rows data.source has",
    "show_text": "whether the report shows text of the audited data (true)",
}
_QUICK = {"canaries": 120, "rows": 48, "guesses": 80, "examples": 64, "shadows": 2}


def taken(words: list[str]) -> Settings:
    """Take the audit's own settings, its run directory and `--quick` out of a command's words.

    Args:
        words: As typed; what is left are keys of the configuration.

    Returns:
        The settings.

    Raises:
        ConfigError: If a value is impossible.
    """
    quick = "--quick" in words
    found: dict[str, Any] = dict(_QUICK) if quick else {}
    rest, run_dirs = [], []
    for word in words:
        key, equals, value = word.partition("=")
        if word == "--quick":
            continue
        if equals and key.isidentifier() and key not in (*HELP, *SHORTHANDS, *known_keys()):
            hint = nearest(key, [*HELP, *SHORTHANDS, *known_keys()])
            raise ConfigError(f"{word!r}: no such setting.{hint} `lamina audit --help` lists them all.")
        if equals and key in HELP:
            found[key] = _value(key, value)
        elif not equals and not word.startswith("-"):
            run_dirs.append(Path(word))
        else:
            rest.append(word)
    words[:] = rest
    if len(run_dirs) > 1:
        raise ConfigError(
            f"lamina audit: expected at most one run directory, got {len(run_dirs)}. Audit each by itself."
        )
    settings = Settings(run_dir=run_dirs[0] if run_dirs else None, quick=quick, **found)
    _check(settings)
    return settings


def _value(key: str, text: str) -> Any:
    kinds = {field.name: str(field.type) for field in fields(Settings)}
    kind = kinds[key]
    try:
        if kind == "bool":
            return {"true": True, "false": False}[text.lower()]
        if kind == "tuple[str, ...]":
            return tuple(part.strip() for part in text.strip("[]").split(",") if part.strip())
        if kind.startswith("Path"):
            return Path(text)
        return {"int": int, "float": float, "str": str}[kind](text)
    except (KeyError, ValueError):
        expected = {"bool": "true or false", "int": "a whole number", "float": "a number"}[kind]
        raise ConfigError(f"{key}={text}: expected {expected}: {HELP[key]}.") from None


def _check(settings: Settings) -> None:
    for part in settings.parts:
        if part not in PARTS:
            raise ConfigError(f"parts={part}: expected any of {', '.join(PARTS)}.{nearest(part, PARTS)}")
    if not settings.parts:
        raise ConfigError(f"parts: expected at least one of {', '.join(PARTS)}, got none.")
    if settings.fail_on not in ("", "violated"):
        raise ConfigError(f"fail_on={settings.fail_on}: expected violated, or nothing.")
    if not 0 < settings.significance < 0.5:
        raise ConfigError(f"significance={settings.significance:g}: expected a number in (0, 0.5), such as 0.05.")
    if settings.canaries < 8:
        raise ConfigError(f"canaries={settings.canaries}: expected at least 8; with fewer nothing can be told.")
    if settings.client and settings.run_dir is None:
        raise ConfigError(
            f"client={settings.client}: expected a deployment's run directory beside it, got none. `lamina audit --help` has "
            "an example."
        )
    if settings.rows < 0:
        raise ConfigError(f"rows={settings.rows}: expected a number of rows a client, or 0 for all of them.")
    if settings.examples < 8:
        raise ConfigError(f"examples={settings.examples}: expected at least 8; with fewer nothing can be told.")
    if not 2 <= settings.guesses <= settings.canaries:
        raise ConfigError(
            f"guesses={settings.guesses}: expected from 2 to {settings.canaries}, the canaries; a guess is of one canary."
        )
    if settings.shadows < 0 or settings.shadows % 2:
        raise ConfigError(
            f"shadows={settings.shadows}: expected an even number, as each row is in half of them, or 0 for none."
        )


def quick(settings: Settings) -> Settings:
    """The settings at quick sizes.

    Args:
        settings: Any.

    Returns:
        The same audit, smaller.
    """
    return replace(settings, quick=True, **_QUICK)  # type: ignore[arg-type]


def campaign_words(settings: Settings, given: Sequence[str]) -> list[str]:
    """The keys of a campaign that the user has not set.

    Args:
        settings: For its size.
        given: Dotted keys that are set.

    Returns:
        Overrides to put before the user's own.
    """
    sizes = QUICK_RUN if settings.quick else _STANDARD_RUN
    return [f"{key}={value}" for key, value in sizes.items() if key not in given]


_STANDARD_RUN = {
    "clients.count": 4, "rounds": 3, "train.local_steps": 40, "train.batch_size": 16, "train.max_length": 32,
    "evaluate.max_examples": 60, "data.generate": 0,
}  # fmt: skip
QUICK_RUN = {
    "clients.count": 3, "rounds": 2, "train.local_steps": 40, "train.batch_size": 16, "train.max_length": 24,
    "evaluate.max_examples": 24, "data.generate": 0,
}  # fmt: skip
