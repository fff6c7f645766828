"""`audit.html`, from the document of `audit.json` alone: one file that refers to nothing outside itself and runs no script.

`reading` takes values out of the document and never raises; `words` says them in plain language; the other files make a section
each. The document holds text of the audited data, which may be anything: it is clipped, escaped where it becomes markup, and
its direction is kept to itself. Nothing here computes a result, but for the curve that a claim allows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lamina.audits.page import bounds, defences, ending, head, mechanism, membership, reconstruction, samples
from lamina.audits.page.reading import at, plain
from lamina.protos.errors import ConfigError
from lamina.protos.pages import style
from lamina.protos.pages.charts import escape

__all__ = ["render"]

SCHEMA = 1

# Each part with its name for the list of what was not measured.
_PARTS: tuple[tuple[str, Callable[[Mapping[str, Any]], str]], ...] = (
    ("the mechanism and its ledger", mechanism.of),
    ("checks of the mechanism", mechanism.checks),
    ("membership", membership.of),
    ("bounds on ε from one run", bounds.of),
    ("exposure of planted sequences", membership.exposure),
    ("whole clients as canaries", bounds.client_canaries),
    ("reconstruction from what each party sees", reconstruction.of),
    ("recital of training text", samples.extraction),
    ("what is new in the model", samples.novelty),
    ("other defences", defences.of),
)

_STYLE = """
.verdict{border-left:5px solid var(--c);padding:.1rem 0 .1rem 1rem;margin:1rem 0}.verdict .lede{margin:.2rem 0}
.verdict ul,section ul{margin:.4rem 0;padding-left:1.2rem;max-width:46rem}li{margin:.2rem 0;overflow-wrap:anywhere}
.good{--c:var(--c2)}.bad{--c:var(--c5)}.unsure{--c:var(--c4)}.plain{--c:var(--c6)}
.banner{background:var(--soft);border:1px solid var(--rule);border-radius:4px;padding:.5rem .8rem;font-size:.9rem}
.yes{color:var(--c2)}.no{color:var(--c5)}.s{width:26%;min-width:10.5rem}td.s{padding-top:0;padding-bottom:0}
td .muted{font-size:.8rem;line-height:1.35}td.n small,td.b small{white-space:nowrap}
.tight th.w{width:18%}.tight td,.tight th{padding-right:.55rem}
.notes{margin:1.6rem 0}td.b{min-width:5.2rem}.s:last-child{padding-right:1rem}
mark{background:var(--q1);color:inherit;border-radius:2px}pre{overflow:hidden;unicode-bidi:isolate}
td .run+.muted{padding-left:1.9em}th.w{width:30%;min-width:11rem}.facts dd small{display:block}
"""


def render(document: Mapping[str, Any]) -> str:
    """The page about one audit.

    Args:
        document: The values of audit.json, schema 1. What is null, missing or malformed is said to be not measured.

    Returns:
        A whole HTML document that refers to nothing outside itself.

    Raises:
        ConfigError: If it is of another schema.
    """
    if document.get("schema") != SCHEMA:
        raise ConfigError(
            f"audit.json: expected schema {SCHEMA}, got {plain(document.get('schema'), 40) or 'none'}. Use the version of "
            "Lamina that wrote it."
        )
    parts = [(name, part(document)) for name, part in _PARTS]
    missing = [name for name, text in parts if not text]
    title = escape(f"Lamina audit: {plain(at(document, 'subject.run_id')) or 'campaign'}")
    body = "".join(
        [head.of(document), *(text for _, text in parts), ending.limits(document, missing), ending.provenance(document)]
    )
    return style.document(title, body, _STYLE)
