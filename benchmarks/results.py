"""benchmarks/RESULTS.md: one section for each benchmark, between comments that name it."""

from __future__ import annotations

from pathlib import Path

PATH = Path(__file__).parent / "RESULTS.md"
TITLE = "# Benchmarks\n\nEach section was written by the command that it names.\n"


def write_section(name: str, command: str, body: str) -> None:
    """Replace the section of one benchmark, or append it; the other sections stay as they are.

    Args:
        name: Of the benchmark; heads the section.
        command: What was run, from the top of the checkout.
        body: Markdown.
    """
    first, last = f"<!-- {name} -->", f"<!-- end of {name} -->"
    text = PATH.read_text() if PATH.exists() else TITLE
    section = f"{first}\n## {name}\n\n`{command}`\n\n{body.strip()}\n{last}"
    before, found, rest = text.partition(first)
    if found:
        text = before + section + rest.partition(last)[2]
    else:
        text = f"{text.rstrip()}\n\n{section}\n"
    PATH.write_text(text)
