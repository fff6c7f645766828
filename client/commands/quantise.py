"""`lamina quantise`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from lamina.protos.errors import ConfigError
from lamina.protos.words import parsed

_HELP = """\
usage: lamina quantise MODEL OUT [format=nf4|int8|mixed|bf16] [compute=bf16|fp32|fp16] [bits=5.0] [compensation=RANK]
                       [revision=COMMIT] [--json]

Writes a copy of a base in fewer bits to the folder OUT, with a manifest of which base it is, what made it and what its files
hold. A site that names the copy as its model loads it as it is, and takes part in runs of the base: adapters are defined against
the full-precision base. compensation=RANK adds low-rank factors that make good some of what quantisation loses; they stay here.

examples:
  lamina quantise ./my-model ./my-model-nf4
  lamina quantise ./my-model ./my-model-mixed format=mixed bits=5
  lamina quantise ./my-model ./my-model-nf4 compensation=16 compute=fp32"""


def main(command: str, words: Sequence[str]) -> int:
    """Run `lamina quantise`.

    Args:
        command: `quantise`.
        words: What follows it.

    Returns:
        Exit code 0.

    Raises:
        ConfigError: If a setting is unknown, the base cannot be loaded, or the target is taken.
    """
    if any(word in ("-h", "--help") for word in words):
        print(_HELP)
        return 0
    known = {"format": "nf4", "compute": "bf16", "bits": "5.0", "compensation": "0", "revision": ""}
    plain, settings = parsed([word for word in words if word != "--json"], known)
    if len(plain) != 2:
        raise ConfigError(
            f"lamina {command}: expected MODEL and OUT, got {len(plain)} words. See `lamina {command} --help`."
        )
    from lamina.client.making import Wanted, make
    from lamina.client.model import quiet

    quiet()
    try:
        bits, rank = float(settings["bits"]), int(settings["compensation"])
    except ValueError:
        raise ConfigError(
            f"bits={settings['bits']}, compensation={settings['compensation']}: expected a number and a rank."
        ) from None
    wanted = Wanted(
        source=plain[0],
        output=Path(plain[1]),
        format=settings["format"],
        compute=settings["compute"],
        bits=bits,
        compensation=rank,
        revision=settings["revision"],
    )
    made = make(wanted, lambda text: print(text, file=sys.stderr))
    total = sum((wanted.output / name).stat().st_size for name in made.files)
    told = {"output": str(wanted.output), "format": made.format, "manifest": made.digest, "num_bytes": total}
    print(
        json.dumps(told, indent=1) if "--json" in words else "\n".join(f"{key}: {value}" for key, value in told.items())
    )
    return 0
