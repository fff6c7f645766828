"""`lamina log`: checks and lists the event log of a run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lamina.protos import chain
from lamina.protos.chain import Disagreement, Fault, Head
from lamina.protos.errors import CheckpointError, ConfigError, IdentityError, nearest
from lamina.protos.words import parsed
from lamina.server.store.events import FILE_NAME
from lamina.server.store.log_check import Checked, check
from lamina.server.store.log_files import Compared, compared

_HELP = """\
usage: lamina log verify RUN_DIR [ca=ca.pem] [witness=FILE]… [--json]
       lamina log show RUN_DIR [--json]

verify  checks every record of RUN_DIR/events.jsonl: its form, its place in the hash chain, the coordinator's signature, the
        clients' certificates and countersignatures. A changed, missing, added or moved record is named; exit code 5.
        Then the files that the records speak of: config.yaml and schema (`begin`), the clients of each round in
        rounds.jsonl (`aggregate`), all of rounds.jsonl and the adapter (`end`). The first that differs is named.
show    lists the records without checking them.

ca:      certificate of the CA that the coordinator and the clients must have; default RUN_DIR/ca.pem if it is there. Without
         one the log is checked against its own first record only. Dates are checked at each record's time.
witness: heads that a site kept, one `n hash` a line; may be given more than once. Only these, or countersignatures, show that
         the end of a log was cut off or that all of it was written anew by its owner.

A last line that is cut short, as a crash leaves it, is reported as torn with exit code 2; the coordinator mends it when it
continues the run.

examples:
  lamina log verify outputs/run-7 ca=~/enrollment/ca.pem
  lamina log verify outputs/run-7 ca=ca.pem witness=site-a-heads.txt witness=site-b-heads.txt
  lamina log show outputs/run-7"""


def main(command: str, words: Sequence[str]) -> int:
    """Run `lamina log verify` or `lamina log show`.

    Args:
        command: `log`.
        words: What follows it.

    Returns:
        Exit code 0; errors are raised.
    """
    if any(word in ("-h", "--help") for word in words):
        print(_HELP)
        return 0
    as_json = "--json" in words
    rest = [word for word in words if word != "--json"]
    what = {"verify": _verify, "show": _show}
    if not rest or rest[0] not in what:
        given = repr(rest[0]) if rest else "nothing"
        raise ConfigError(
            f"lamina {command}: expected verify or show, got {given}.{nearest(rest[0] if rest else '', what)} "
            f"See `lamina {command} --help`."
        )
    return what[rest[0]](rest[1:], as_json)


def _verify(words: Sequence[str], as_json: bool) -> int:
    # `witness` may be given several times, so it is taken out before the settings are read.
    kept = [word.removeprefix("witness=") for word in words if word.startswith("witness=")]
    plain, settings = parsed([word for word in words if not word.startswith("witness=")], {"ca": "", "witness": ""})
    run_dir = _run_dir(plain, "verify")
    beside = run_dir / "ca.pem"
    ca = Path(settings["ca"]).expanduser() if settings["ca"] else beside if beside.exists() else None
    witnesses = {
        name: chain.witness_heads(_read(Path(name).expanduser()).decode("ascii", "replace"), name) for name in kept
    }
    checked = check(run_dir / FILE_NAME, None if ca is None else _read(ca), str(ca))
    disagreements = {name: chain.against(heads, checked.verified) for name, heads in witnesses.items()}
    files = [] if checked.verified.bad else compared(run_dir, checked.said)
    failure = _failure(run_dir, checked, disagreements, files)
    if as_json:
        report = _report(checked, ca, witnesses, disagreements) | {"files": [asdict(one) for one in files]}
        print(json.dumps(report | {"verdict": "intact" if failure is None else str(failure)}, indent=1))
    else:
        print("\n".join(_lines(run_dir, checked, ca, witnesses, disagreements)))
        for one in files:
            print(f"{one.name}: {one.state}: {one.told}")
    if failure is not None:
        raise failure
    if not as_json:
        print("verdict: intact" + ("" if checked.coordinator else ", as far as an unsigned log can show"))
    return 0


def _run_dir(plain: Sequence[str], what: str) -> Path:
    if len(plain) != 1:
        raise ConfigError(f"lamina log {what}: expected one run directory, got {len(plain)}. See `lamina log --help`.")
    run_dir = Path(plain[0])
    if not (run_dir / FILE_NAME).is_file():
        raise ConfigError(
            f"{run_dir}: expected a run directory with {FILE_NAME}, found none. Simulations keep no event log."
        )
    return run_dir


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: expected a file that can be read, got {error.strerror}.") from None


def _failure(
    run_dir: Path, checked: Checked, disagreements: dict[str, list[Disagreement]], files: Sequence[Compared]
) -> IdentityError | CheckpointError | None:
    where = run_dir / FILE_NAME
    verified = checked.verified
    if verified.bad is not None:
        return IdentityError(
            f"{where}, {verified.bad}. Only the {verified.records} records before it hold; look for the change with another "
            "copy of the log, or with heads that the sites kept."
        )
    for name, found in disagreements.items():
        if found:
            first = found[0]
            return IdentityError(
                f"{where}: expected record {first.witness.n} with the hash {first.witness.hash} that {name} kept, got "
                f"{first.found}: the log was {first.why} after a site saw it ({len(found)} such heads). Ask whoever keeps "
                "the log for the whole one."
            )
    recorded = _summary_run_id(run_dir)
    if recorded and checked.run_id and recorded != checked.run_id:
        return IdentityError(
            f"{where}: expected the log of run {recorded!a} as in summary.json, got that of run {checked.run_id!a}."
        )
    for one in files:
        if one.state == "differs":
            return IdentityError(
                f"{run_dir / one.name}: {one.told}. The file was changed or lost after the coordinator signed; fetch it "
                "again, or take another copy."
            )
    if verified.torn_bytes:
        return CheckpointError(
            f"{where}, line {verified.lines}: torn: expected a newline at its end, got {verified.torn_bytes} bytes without "
            "one. A crash amid a write leaves this, and so does a cut. Continue the run and its coordinator mends it; in a "
            "finished run compare with another copy."
        )
    return None


def _summary_run_id(run_dir: Path) -> str:
    try:
        summary = json.loads((run_dir / "summary.json").read_bytes())
    except FileNotFoundError:  # the run is not over
        return ""
    except (OSError, ValueError):
        raise ConfigError(f"{run_dir / 'summary.json'}: expected a JSON object, got something else.") from None
    return str(summary.get("run_id") or "") if isinstance(summary, dict) else ""


def _newest(heads: Sequence[Head]) -> Head:
    return max(heads, key=lambda head: head.n)


def _unwitnessed(checked: Checked) -> int:
    """How many records at the end no site has countersigned: they could be rewritten without a trace in the log."""
    seen = [_newest(heads).n for heads in checked.verified.countersigned.values()]
    return checked.verified.records - 1 - max(seen, default=-1)


def _report(
    checked: Checked, ca: Path | None, witnesses: dict[str, list[Head]], disagreements: dict[str, list[Disagreement]]
) -> dict[str, Any]:
    verified = checked.verified
    bad = verified.bad
    return {
        "records": verified.records,
        "rounds": sorted(checked.rounds),
        "run_id": checked.run_id,
        "head": asdict(verified.head),
        "signed": checked.coordinator is not None,
        "coordinator": checked.coordinator.name if checked.coordinator else None,
        "ca": None if ca is None else str(ca),
        "countersignatures": {
            client_id: asdict(_newest(heads)) | {"count": len(heads)}
            for client_id, heads in sorted(verified.countersigned.items())
        },
        "unwitnessed": _unwitnessed(checked),
        "witnesses": {
            name: {"heads": len(heads), "disagree": [asdict(one) for one in disagreements[name]]}
            for name, heads in witnesses.items()
        },
        "torn_bytes": verified.torn_bytes,
        "bad": None if bad is None else {"line": bad.line, "n": bad.n, "kind": bad.kind} | asdict(bad.fault),
    }


def _lines(
    run_dir: Path,
    checked: Checked,
    ca: Path | None,
    witnesses: dict[str, list[Head]],
    disagreements: dict[str, list[Disagreement]],
) -> list[str]:
    verified = checked.verified
    rounds = (
        f"rounds {min(checked.rounds)} to {max(checked.rounds)} ({len(checked.rounds)})"
        if checked.rounds
        else "no round"
    )
    lines = [
        f"{run_dir / FILE_NAME}: {verified.records} good records of {verified.lines} lines, {rounds}",
        f"head: {verified.head.n} {verified.head.hash}",
        _trust(run_dir, checked, ca),
    ]
    for client_id, heads in sorted(verified.countersigned.items()):
        plural = "head" if len(heads) == 1 else "heads"
        lines.append(f"countersigned by {client_id!a}: {len(heads)} {plural}, the newest {_newest(heads).n}")
    if checked.coordinator is not None:
        end = _unwitnessed(checked)
        lines.append(
            f"records after the last countersigned head: {end}"
            + (", which their owner could write anew" if end else "")
        )
    for name, heads in witnesses.items():
        lines.append(f"{name}: {len(heads) - len(disagreements[name])} of {len(heads)} kept heads are in the log")
    return lines


def _trust(run_dir: Path, checked: Checked, ca: Path | None) -> str:
    if checked.coordinator is None:
        return (
            "unsigned: chain only. The run had no certificates: damage and clumsy changes are found, but whoever can write "
            "the file can write another that passes, and countersignatures prove nothing."
        )
    signed = f"signed by coordinator {checked.coordinator.name}"
    if ca is None:
        return (
            f"{signed} by the log's own first record, checked against no CA: another key could have signed another log. "
            "Give ca=ca.pem."
        )
    if ca == run_dir / "ca.pem":
        return f"{signed}, certificates checked against {ca}, which lies beside the log. Give ca= from your own enrollment."
    return f"{signed}, certificates checked against {ca}"


def _show(words: Sequence[str], as_json: bool) -> int:
    plain, _ = parsed(words, {})
    run_dir = _run_dir(plain, "show")
    with (run_dir / FILE_NAME).open("rb") as file:
        listed = [_listed(number, line) for number, line in enumerate(chain.lines_of(file), 1)]
    if as_json:
        print(json.dumps(listed, indent=1))
        return 0
    for entry in listed:
        if "why" in entry:
            print(f"line {entry['line']}: {entry['why']}: expected {entry['expected']}, got {entry['found']}")
        else:
            text = chain.canonical_json(_brief(entry["fields"])).decode("ascii")
            print(
                f"{entry['n']:>6}  {entry['time']}  {entry['kind']:<12} {text if len(text) <= 160 else text[:157] + '...'}"
            )
    print(f"{len(listed)} lines, not checked; see `lamina log verify {run_dir}`.")
    return 0


def _listed(number: int, line: bytes) -> dict[str, Any]:
    claims = chain.claims(line)
    n, prev = claims.get("n"), claims.get("prev")
    # Read as if it followed whatever it says it follows: each line is listed for itself.
    before = Head(n - 1, prev) if type(n) is int and isinstance(prev, str) else chain.GENESIS
    record = chain.read(line, before)
    if isinstance(record, Fault):
        return {"line": number} | asdict(record)
    return {"line": number, "n": record.n, "time": record.time, "kind": record.kind, "fields": dict(record.fields)}


def _brief(fields: dict[str, Any]) -> dict[str, Any]:
    return {
        key: "(PEM)" if isinstance(value, str) and value.startswith("-----BEGIN") else value
        for key, value in fields.items()
    }
