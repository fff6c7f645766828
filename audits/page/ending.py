"""The end of the page: what was not looked at, the limits of what was, and what it takes to check or repeat it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lamina.audits.page.reading import MANY, at, entries, inline, listed, number, plain
from lamina.protos.pages.tables import duration, num, section, tiles

Document = Mapping[str, Any]


def limits(document: Document, missing: Sequence[str]) -> str:
    """What the audit cannot say, in its own words, and the parts that it left out."""
    said = [f"<li>{inline(one, 800)}</li>" for one in listed(document, "limits")[:50]]
    absent = f"<p>Not measured in this audit: {'; '.join(missing)}.</p>" if missing else ""
    return section(
        "What this audit cannot say",
        "Read the figures above with these in mind.",
        f"{absent}<ul>{''.join(said)}</ul>",
    )


def provenance(document: Document) -> str:
    """Hashes, versions, seed and command."""
    subject = document.get("subject")
    seconds, seed = number(document, "seconds"), document.get("seed")
    facts: list[tuple[str, Any]] = [
        ("audited", at(subject, "run_id") or at(subject, "kind")),
        ("strategy", at(subject, "strategy")),
        ("model", at(subject, "model")),
        ("data", at(subject, "data")),
        ("made at", document.get("made_at")),
        ("Lamina", document.get("lamina")),
        *((f"version of {name}", one) for name, one in entries(document, "versions")[:MANY]),
        ("seed of the audit", num(number(document, "seed"), 0) if not isinstance(seed, str) else seed),
        ("quick", {True: "yes", False: "no"}.get(document.get("quick") is True)),
        ("took", duration(seconds) if seconds is not None else None),
        ("command", document.get("command")),
        *((f"setting {name}", _setting(one)) for name, one in entries(document, "settings")[:MANY]),
        *((f"SHA-256, {name}", one) for name, one in entries(subject, "hashes")[:MANY]),
    ]
    rows = [(inline(name, 80), inline(value, 400), "") for name, value in facts if plain(value)]
    return section("Provenance", "What it takes to find or repeat this audit.", tiles(rows, "facts")) + _signature(
        document
    )


def _setting(value: Any) -> Any:
    return ", ".join(plain(one, 40) for one in value[:20]) if isinstance(value, list | tuple) else value


def _signature(document: Document) -> str:
    signature = document.get("signature")
    how = (
        "<p>To check it, run <code>lamina audit verify DIR ca=ca.pem</code> with the consortium's CA certificate on the "
        "folder that holds audit.json and this page. It checks the signature, who the auditor is, and that this page says "
        "what audit.json says. The page alone proves nothing: whoever changes it can change this line too.</p>"
    )
    if not isinstance(signature, Mapping):
        return section("Signature", "Nobody signed this audit, so nothing shows that it is unchanged.")
    facts = [
        ("says it is signed by", signature.get("name")),
        ("as an auditor of", signature.get("organisation")),
        ("certificate", signature.get("fingerprint")),
        ("algorithm", signature.get("algorithm")),
    ]
    rows = [(name, inline(value), "") for name, value in facts if plain(value)]
    return section("Signature", "An auditor's signature covers everything in audit.json.", tiles(rows, "facts") + how)
