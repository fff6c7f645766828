"""`python -m tests.attacks.fuzz.collect SECONDS [SEED]`: adds the shortest payload of each kind of outcome to the corpus."""

from __future__ import annotations

import collections
import sys
import tempfile
from pathlib import Path

from tests.attacks.fuzz.test_fuzz import CORPUS, campaign, tried

# A payload above the cap is over a megabyte: the campaign makes it, the corpus does not keep it.
_SMALL_BYTES = 6000


def main(seconds: float, seed: int) -> None:
    CORPUS.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        known = {tried(path.read_bytes(), place / "payload").kind for path in CORPUS.glob("*")}
        found = campaign(seed, seconds, place)
    numbers: collections.Counter[str] = collections.Counter(
        path.name.rstrip("0123456789").rstrip("-") for path in CORPUS.glob("*")
    )
    for kind, payload in sorted(found.kinds.items()):
        if kind not in known and len(payload) <= _SMALL_BYTES:
            reason = kind.partition(":")[0]
            numbers[reason] += 1
            (CORPUS / f"{reason}-{numbers[reason]:02d}").write_bytes(payload)
    print(f"{found.tries} payloads, {dict(found.reasons)}; {len(list(CORPUS.glob('*')))} in the corpus")


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1)
