"""What the trained model says by itself: training text that it continues word for word, and what is new in it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lamina.audits.page.marking import block, containing, continued, listing
from lamina.audits.page.reading import LONG, listed, number, objects, plain
from lamina.audits.page.words import percent
from lamina.protos.pages.charts import Axis, escape, usable
from lamina.protos.pages.rows import scaled, span_row
from lamina.protos.pages.tables import num, section, table

Document = Mapping[str, Any]
_SHOWN, _MOST = 4, 24
_MATCH = {
    "verbatim": "mean_match_tokens",
    "verbatim_base": "mean_match_tokens_base",
    "verbatim_held_out": "mean_match_tokens_held_out",
}


def extraction(document: Document) -> str:
    """Verbatim continuations of the trained model beside those of the public base and of text that nobody trained on."""
    if not isinstance(document.get("extraction"), Mapping):
        return ""
    rows_of = (
        ("trained model, its training text", "verbatim", "c1"),
        ("public base model, the same text", "verbatim_base", "c6"),
        ("trained model, text that nobody trained on", "verbatim_held_out", "c6"),
    )
    scale, ticks = scaled([], "share of prompts", Axis("", bounds=(0.0, 1.0)))
    rows = []
    for name, key, style in rows_of:
        value, match = number(document, f"extraction.{key}"), number(document, f"extraction.{_MATCH[key]}")
        drawn = span_row((0.0, value), [(value, f"fill {style}")], [], scale, f"{name}: {percent(value)}")
        rows.append([name, percent(value), drawn, num(match, 1)])
    prefix, new = number(document, "extraction.prefix_tokens"), number(document, "extraction.new_tokens")
    length = f" for {num(new, 0)} tokens" if new is not None else ""
    every, shown = objects(document, "extraction.examples"), []
    for example in every[:_MOST]:
        original, found = continued(example.get("original"), example.get("continued"))
        prompt = escape(plain(example.get("prefix"), LONG))
        both = f'<div class="pair">{block("The text went on", original)}{block("The model went on", found)}</div>'
        shown.append(f"{block('Given', prompt)}{both}")
    return section(
        "Does it recite its training text?",
        f"The model was given the first {num(prefix, 0)} tokens of {num(number(document, 'extraction.prompts'), 0)} training "
        f"texts. Counted is how often it goes on exactly as the text does{length}; the two lower rows are the level of chance. "
        "Marked below: what it continues word for word.",
        table(
            [("t w", "who continues what"), ("n", "word for word"), ("s", ticks), ("n", "right tokens in a row")], rows
        )
        + listing(shown, _SHOWN, "examples", len(every)),
    )


def novelty(document: Document) -> str:
    """Samples of what the trained model prefers over the base, for a person to read."""
    samples = objects(document, "novelty.samples")
    overlap, base = number(document, "novelty.overlap_rate"), number(document, "novelty.base_overlap_rate")
    if not samples and overlap is None:
        return ""
    shown = []
    for sample in samples[:_MOST]:
        passages = [*listed(sample, "shared"), sample.get("longest")]
        facts = [
            escape(plain(sample.get("variant"), 40)),
            f"score {num(number(sample, 'score'), 2)}" if usable(number(sample, "score")) else "",
            f"{percent(number(sample, 'overlap'))} of it in the training text"
            if usable(number(sample, "overlap"))
            else "",
            f"longest common run {num(number(sample, 'longest'), 0)} tokens"
            if usable(number(sample, "longest"))
            else "",
        ]
        title = '<span class="muted">' + "; ".join(fact for fact in facts if fact) + "</span>"
        shown.append(block(title, containing(sample.get("text"), passages)))
    rate = (
        f" Of all samples {percent(overlap)} is found in the training text word for word" if overlap is not None else ""
    )
    beside = (
        f", of samples of the public base {percent(base)}, which is chance."
        if base is not None
        else "."
        if rate
        else ""
    )
    return section(
        "What is new in the model?",
        "Text that the trained model writes and the base model would not, drawn from the difference of the two. It is for a "
        "person to read: it shows subjects, languages or phrases that the training brought in, which privacy for single "
        f"records does not hide. It is no test of the claim.{rate}{beside}",
        listing(shown, _SHOWN, "samples", len(samples)),
    )
