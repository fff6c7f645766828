"""`lamina audit`: words to settings, the audit, its two files and the exit code; and `lamina audit verify`."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from lamina.audits import audit as audits
from lamina.audits import document as documents
from lamina.audits import page, signing
from lamina.audits.settings import HELP, Settings, campaign_words, taken
from lamina.audits.telling import Telling
from lamina.client.model import quiet
from lamina.protos import compose
from lamina.protos.config import Config, known_keys
from lamina.protos.errors import ConfigError
from lamina.protos.files import alone, write_atomic
from lamina.protos.words import parsed
from lamina.simulations.progress import Terminal
from lamina.simulations.run import default_output

_EXAMPLES = """\
usage: lamina audit [RUN_DIR] [key=value …] [--quick] [--config FILE.yaml] [--json]
       lamina audit verify DIR ca=CA.pem

What could each party learn from a run, and does the claimed epsilon hold? Audits a finished run, or, without RUN_DIR, a
campaign of its own with canaries in the data. Writes audit.json and audit.html. Both hold text of the audited data.

examples:
  lamina audit --quick
      a small campaign on the base and the text that come with the package, in under a minute
  lamina audit privacy=example-dp privacy.epsilon=8
      does the claim hold? canaries, checks of the mechanism, attacks
  lamina audit outputs/demo/stack
      a finished simulation: what other clients could read of each client's text
  lamina audit parts=defences
      the same attacks under every defence, in one table
  lamina audit RUN_DIR client=site-2 model=./base data=notes.jsonl
      a deployment's run, by the site whose rows these are
  lamina audit RUN_DIR fail_on=violated identity=auditor
      signed with the auditor's key; exit code 4 if the claim is refuted
  lamina audit verify RUN_DIR/audit ca=ca.pem

exit codes: 0 whenever the audit completes; with fail_on=violated 4 for that verdict

keys of the audit:"""
_VERIFY = {"ca": "", "revocations": ""}


def main(command: str, words: Sequence[str]) -> int:
    """Run `lamina audit`.

    Args:
        command: `audit`.
        words: What follows it.

    Returns:
        Exit code 0, or 4 for a verdict that was to fail; errors are raised.
    """
    words = list(words)
    if any(word in ("-h", "--help") for word in words):
        print(_help())
        return 0
    if words[:1] == ["verify"]:
        return _verify(words[1:])
    as_json = "--json" in words
    words = [word for word in words if word != "--json"]
    settings = taken(words)
    if settings.identity:
        signing.signed({"made_at": documents.now()}, Path(settings.identity))  # refused before the work, not after it
    console = Console(stderr=as_json, width=None if sys.stdout.isatty() else 120)
    quiet()
    config, overrides = _asked(settings, words)
    folder = settings.output or _folder(settings)
    if settings.identity:
        _check_nothing_to_take_up(settings.run_dir, folder)
    telling = Telling(console, 1 + len(settings.parts))
    if config is not None and settings.output is None:
        telling.say(f"folder: {folder}; broken off, the audit goes on with output={folder}")
    watcher = Terminal(console, "campaign" if config else "replay")
    before = os.umask(0o077)  # what an audit leaves holds text of the data, or updates that it can be read from
    try:
        _check_there(settings.run_dir)
        with alone(
            folder, "output", "expected no other audit at work there, found one. Wait for it, or give another output."
        ):
            document = audits.audit(settings, config, overrides, folder, (telling, watcher))
            if settings.identity:
                document = signing.signed(document, Path(settings.identity))
            _write(folder, document)
            audits.finish(folder)
    finally:
        os.umask(before)
        with contextlib.suppress(OSError):
            folder.rmdir()  # where nothing came of it; a folder that holds anything stays
        watcher.end()
        telling.end()
    _tell(console, document, folder)
    if as_json:
        print(json.dumps(document, indent=1))
    return 4 if settings.fail_on == document["verdict"] else 0


def _check_there(run_dir: Path | None) -> None:
    """Raise where there is no such folder, before a folder for its audit is made in it."""
    if run_dir is not None and not run_dir.is_dir():
        raise ConfigError(
            f"{run_dir}: expected a finished run, found no folder. Name one, or leave it out to have a campaign."
        )


def _help() -> str:
    own = [f"  {key}=\n      {text}" for key, text in HELP.items()]
    head = "\n".join([_EXAMPLES, *own, "", "keys of the campaign, as of `lamina simulate` (default):"])
    return compose.help_text(head, [key for key in known_keys() if key.split(".")[0] not in ("client", "coordinator")])


def _asked(settings: Settings, words: list[str]) -> tuple[Config | None, list[str]]:
    """The campaign's config, or None and the overrides for a finished run."""
    if settings.run_dir is None:
        base = compose.take_config(words, "--quick, --config FILE, --json, --help")
        given = compose.keys_of(words)
        overrides = compose.sweeps([*campaign_words(settings, given), *words], False)[0]
        return compose.composed(overrides, base), []
    compose.take_config(words, "--quick, --json, --help")
    allowed = ("data.", "model.", "train.device", "threads")
    for key in compose.keys_of(words):
        if not key.startswith(allowed):
            raise ConfigError(
                f"{key}: a finished run is audited as it is; only data.*, model.*, train.device and threads say where its base "
                "and rows are now. Leave the run directory out to audit a campaign with other settings."
            )
    return None, compose.sweeps(words, False)[0]


def _folder(settings: Settings) -> Path:
    if settings.run_dir is not None:
        return settings.run_dir / "audit"
    made = default_output()
    return made.with_name(f"{made.name}-audit")


def _check_nothing_to_take_up(run_dir: Path | None, folder: Path) -> None:
    """An auditor signs what was found here, and whoever hands a run over may have put findings of an audit into it."""
    if run_dir is None or not folder.is_dir() or run_dir.resolve() not in folder.resolve().parents:
        return
    if left := sorted(one.name for one in folder.iterdir() if one.name not in ("audit.json", "audit.html")):
        raise ConfigError(
            f"{folder}: expected nothing of an earlier audit within the run that is to be signed for, found "
            f"{', '.join(left[:4])}, which would be taken for what was found now. Remove the folder, or give an output "
            "outside of the run."
        )


def _write(folder: Path, document: Mapping[str, Any]) -> None:
    """Both files, for their owner's eyes alone, as they hold text of the data; the page first: a document has its page."""
    for name, text in (("audit.html", page.render(document)), ("audit.json", json.dumps(document, indent=1) + "\n")):
        write_atomic(folder / name, text)


def _tell(console: Console, document: Mapping[str, Any], folder: Path) -> None:
    claim = document["claim"]
    about = (
        ""
        if claim is None
        else f" (claimed epsilon {claim['epsilon']:.3g} at delta {claim['delta']:.0e}, by {claim['unit']})"
    )
    console.print(f"\nverdict: {document['verdict']}{about}", style="bold", highlight=False, markup=False)
    for reason in document["reasons"]:
        console.print(f"  {reason}", highlight=False, markup=False)
    console.print(f"report: {folder / 'audit.html'}", highlight=False, markup=False)


def _verify(words: Sequence[str]) -> int:
    plain, given = parsed(words, _VERIFY)
    if len(plain) != 1:
        raise ConfigError("lamina audit verify: expected one folder with audit.json. See `lamina audit --help`.")
    if not given["ca"]:
        raise ConfigError(
            "lamina audit verify: expected ca=FILE, the consortium's ca.pem, from a source that is trusted."
        )
    folder, revoked = Path(plain[0]), Path(given["revocations"]) if given["revocations"] else None
    document = signing.parsed(_content(folder / "audit.json"))
    who = signing.check(document, _content(Path(given["ca"])), datetime.now(UTC), revoked)
    signing.check_page(document, _content(folder / "audit.html").decode("utf-8", "replace"))
    print(
        f"signed by {who.name} of {who.consortium} ({who.role}), at {document['made_at']}; verdict: {document['verdict']}"
    )
    return 0


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: expected a file that can be read, got {type(error).__name__}.") from None
