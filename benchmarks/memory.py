"""The memory model against what training takes, each configuration in a process of its own.

    python benchmarks/memory.py [--quick]

Models of the LLaMA family from 5 to 278 million random parameters; measured is the peak of resident memory, from the imports to
the end of the second optimizer step, less what was resident after the imports. Predicted is `client.sizing.memory.peak_bytes`
from the model's configuration alone. The model of memory was made, and what libraries take was measured, with 68 configurations
in sight (`--seen`); the figures are those of 36 others, of other models, ranks and lengths, drawn up before any of them was run.
`--quick` takes a fixed part of these. A base's files are dropped from the page cache before each measurement, as how much of a
mapped file becomes resident with what is touched depends on how it came there.

- `median_error`, `p95_error`: of |predicted - measured| / measured.
- `worst_underprediction`: the largest (measured - predicted) / measured.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.results import write_section  # noqa: E402

CACHE = ROOT / "benchmarks" / "cache" / "memory"
LEAST_BYTES = 64 * 10**6
STEPS = 2
BOUNDS = {"median_error": 0.08, "p95_error": 0.15, "worst_underprediction": 0.10}
# Name -> hidden, intermediate, layers, vocabulary, heads, key-value heads, tied embeddings.
MODELS: dict[str, tuple[int, int, int, int, int, int, bool]] = {
    "6M": (256, 688, 6, 4096, 8, 8, False),
    "17M": (384, 1024, 6, 8192, 6, 2, False),
    "34M": (512, 1376, 8, 8192, 8, 8, False),
    "57M": (768, 2048, 8, 8192, 12, 4, True),
    "110M": (768, 2048, 12, 16384, 12, 12, False),
    "271M": (1024, 2816, 16, 32000, 16, 16, False),
    "9M": (320, 864, 5, 6144, 5, 5, False),
    "45M": (640, 1712, 8, 12288, 10, 2, False),
    "75M": (896, 2432, 7, 10240, 14, 14, True),
    "205M": (1024, 2752, 12, 24576, 16, 8, False),
    "5M": (192, 512, 10, 3072, 6, 2, False),
    "14M": (352, 960, 6, 7168, 11, 11, False),
    "26M": (480, 1280, 9, 9216, 15, 5, True),
    "63M": (704, 1920, 9, 6144, 11, 11, False),
    "126M": (832, 2304, 15, 20480, 13, 1, True),
    "278M": (1152, 3072, 15, 28672, 18, 6, False),
}


@dataclass(frozen=True)
class Case:
    """One configuration."""

    model: str
    format: str
    compute: str
    rank: int
    batch_size: int
    length: int
    checkpointing: bool = False


SEEN = [
    Case("34M", "fp32", "fp32", 8, 4, 128), Case("34M", "fp32", "fp32", 16, 2, 512),
    Case("34M", "fp32", "fp32", 8, 4, 256, True), Case("34M", "bf16", "bf16", 16, 4, 128),
    Case("34M", "bf16", "bf16", 8, 4, 256, True), Case("34M", "nf4", "fp32", 16, 4, 256),
    Case("34M", "nf4", "bf16", 8, 2, 256), Case("34M", "nf4", "fp32", 16, 8, 128, True),
    Case("34M", "int8", "fp32", 8, 2, 256), Case("110M", "fp32", "fp32", 8, 1, 256),
    Case("110M", "fp32", "fp32", 16, 2, 256, True), Case("110M", "bf16", "bf16", 8, 1, 128),
    Case("110M", "nf4", "fp32", 8, 1, 256), Case("110M", "nf4", "fp32", 16, 2, 256, True),
    Case("110M", "int8", "fp32", 16, 1, 128, True), Case("6M", "fp32", "fp32", 8, 8, 256),
]  # fmt: skip
SEEN += [
    Case("6M", "nf4", "fp32", 4, 8, 128), Case("17M", "fp32", "fp32", 4, 4, 192),
    Case("17M", "fp32", "fp32", 32, 8, 128, True), Case("17M", "nf4", "fp32", 64, 4, 256),
    Case("17M", "bf16", "bf16", 4, 4, 192), Case("17M", "int8", "fp32", 32, 4, 192),
    Case("57M", "fp32", "fp32", 4, 2, 192), Case("57M", "fp32", "fp32", 64, 1, 384, True),
    Case("57M", "nf4", "fp32", 4, 2, 192), Case("57M", "nf4", "fp32", 32, 2, 384, True),
    Case("57M", "nf4", "bf16", 4, 1, 384), Case("57M", "int8", "fp32", 4, 2, 192),
    Case("57M", "bf16", "bf16", 32, 1, 192), Case("57M", "bf16", "bf16", 4, 3, 192, True),
    Case("57M", "int8", "fp32", 64, 1, 384, True), Case("271M", "fp32", "fp32", 4, 1, 192),
    Case("271M", "nf4", "fp32", 4, 1, 192), Case("271M", "nf4", "fp32", 64, 1, 384, True),
    Case("271M", "int8", "fp32", 4, 1, 192, True), Case("271M", "bf16", "bf16", 4, 1, 96),
]  # fmt: skip
SEEN += [
    Case(model, number_format, compute, rank, batch_size, length, checkpointing)
    for model, scale in (("9M", 4), ("45M", 1), ("75M", 1), ("205M", 1))
    for number_format, compute, rank, batch_size, length, checkpointing in (
        ("fp32", "fp32", 6, 2 * scale, 160, False), ("fp32", "fp32", 48, scale, 320, True),
        ("bf16", "bf16", 12, scale, 160, False), ("nf4", "fp32", 6, 2 * scale, 160, False),
        ("nf4", "fp32", 48, scale, 320, True), ("nf4", "bf16", 12, scale, 160, False),
        ("int8", "fp32", 6, scale, 320, False), ("int8", "fp32", 24, 2 * scale, 160, True),
    )
]  # fmt: skip
UNSEEN = [
    Case("5M", "fp32", "fp32", 10, 6, 208), Case("5M", "bf16", "bf16", 20, 8, 112),
    Case("5M", "nf4", "fp32", 40, 4, 448, True), Case("5M", "nf4", "bf16", 5, 6, 208),
    Case("5M", "int8", "fp32", 20, 8, 208, True), Case("5M", "int8", "fp32", 5, 4, 240),
    Case("14M", "fp32", "fp32", 2, 4, 240), Case("14M", "fp32", "fp32", 40, 6, 208, True),
    Case("14M", "bf16", "bf16", 10, 3, 240, True), Case("14M", "nf4", "fp32", 5, 8, 112),
    Case("14M", "nf4", "bf16", 20, 4, 112), Case("14M", "int8", "fp32", 40, 4, 448, True),
    Case("26M", "fp32", "fp32", 20, 3, 240, True), Case("26M", "bf16", "bf16", 5, 2, 208),
    Case("26M", "nf4", "fp32", 10, 4, 240), Case("26M", "nf4", "bf16", 40, 3, 208, True),
    Case("26M", "int8", "fp32", 10, 2, 448, True), Case("26M", "int8", "fp32", 2, 3, 112),
    Case("63M", "fp32", "fp32", 96, 1, 576, True), Case("63M", "fp32", "fp32", 5, 2, 208),
    Case("63M", "bf16", "bf16", 24, 2, 112), Case("63M", "nf4", "fp32", 24, 2, 240),
    Case("63M", "nf4", "bf16", 2, 2, 208), Case("63M", "int8", "fp32", 20, 3, 208, True),
    Case("126M", "fp32", "fp32", 10, 1, 240), Case("126M", "bf16", "bf16", 40, 1, 208, True),
    Case("126M", "nf4", "fp32", 20, 1, 448, True), Case("126M", "nf4", "bf16", 10, 1, 112),
    Case("126M", "int8", "fp32", 5, 1, 208), Case("126M", "int8", "fp32", 40, 2, 240, True),
    Case("278M", "fp32", "fp32", 20, 1, 208, True), Case("278M", "bf16", "bf16", 2, 1, 112),
    Case("278M", "nf4", "fp32", 10, 1, 208), Case("278M", "nf4", "bf16", 24, 1, 240, True),
    Case("278M", "nf4", "bf16", 5, 2, 72), Case("278M", "int8", "fp32", 2, 1, 240, True),
]  # fmt: skip
QUICK = [case for case in UNSEEN if case.model in ("5M", "14M")]


def model_at(name: str, number_format: str, compute: str) -> Path:
    """A folder with a random model, or its quantised copy; made once."""
    folder = CACHE / (name if number_format in ("fp32", "bf16") else f"{name}-{number_format}-{compute}")
    if (folder / "config.json").is_file():
        return folder
    if number_format in ("fp32", "bf16"):
        _make_model(folder, *MODELS[name])
    else:
        from lamina.client.making import Wanted, make

        make(Wanted(str(model_at(name, "fp32", "")), folder, number_format, compute), lambda text: None)
    return folder


def _make_model(
    folder: Path, hidden: int, intermediate: int, layers: int, vocab: int, heads: int, kv_heads: int, tied: bool
) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from lamina.client.loading import TINY

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, vocab_size=vocab,
        num_attention_heads=heads, num_key_value_heads=kv_heads, tie_word_embeddings=tied,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    for found in TINY.glob("tokenizer*"):
        shutil.copy(found, folder)


def _drop_from_cache(folder: Path) -> None:
    for path in folder.iterdir():
        file = os.open(path, os.O_RDONLY)
        try:
            os.fsync(file)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(file)


def measured_and_predicted(case: Case) -> dict[str, Any]:
    """Bytes of one configuration, both ways."""
    from lamina.client.sizing.memory import Step, peak_bytes
    from lamina.client.sizing.probe import Trial, measure
    from lamina.client.sizing.shape import shape_of

    folder = model_at(case.model, case.format, case.compute)
    trial = Trial(
        str(folder), case.format, case.compute, case.rank, case.batch_size, case.length, case.checkpointing, STEPS, 1
    )
    _drop_from_cache(folder)
    found = measure(trial)
    if found is None:
        raise OSError(f"{case}: it did not fit")
    shape = shape_of(str(folder))
    step = Step(
        default=case.format,
        compute=case.compute,
        ranks={module: min(case.rank, *sides) for module, sides in shape.linears.items()},
        tokens=case.batch_size * case.length,
        checkpointing=case.checkpointing,
        file_bytes=4 * shape.parameters if case.format == "bf16" else 0,
        seen_tokens=None if case.format in ("fp32", "bf16") else STEPS * case.batch_size * case.length,
    )
    predicted = peak_bytes(shape, step)
    return {"case": case, "measured": found.increment_bytes, "predicted": predicted}


def figures(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Errors over configurations that take enough to matter."""
    errors = [row["predicted"] / row["measured"] - 1 for row in rows if row["measured"] >= LEAST_BYTES]
    sizes = sorted(abs(error) for error in errors)
    return {
        "median_error": statistics.median(sizes),
        "p95_error": sizes[min(len(sizes) - 1, int(0.95 * len(sizes)))],
        "worst_underprediction": max(0.0, -min(errors)),
        "configurations": len(sizes),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a fixed part of the unseen ones, some three minutes")
    parser.add_argument("--seen", action="store_true", help="the part that was in sight")
    options = parser.parse_args()
    cases = SEEN if options.seen else QUICK if options.quick else UNSEEN
    lines = ["| model | format, compute | rank | batch x length | checkpointing | measured MB | predicted MB | error |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    rows = []
    for case in cases:
        row = measured_and_predicted(case)
        rows.append(row)
        error = row["predicted"] / row["measured"] - 1
        shown = "yes" if case.checkpointing else "no"
        lines.append(
            f"| {case.model} | {case.format}, {case.compute} | {case.rank} | {case.batch_size} x {case.length} | {shown} | "
            f"{row['measured'] / 1e6:.0f} | {row['predicted'] / 1e6:.0f} | {error:+.1%} |"
        )
        print(lines[-1], flush=True)
    found = figures(rows)
    text = "\n".join(lines)
    if not options.quick and not options.seen:
        bounds = ", ".join(f"{name} {found[name]:.3f} (bound {bound})" for name, bound in BOUNDS.items())
        write_section("memory", "python benchmarks/memory.py", f"{__doc__.split(chr(10), 4)[4]}\n{bounds}\n\n{text}")
    print(json.dumps({"benchmark": "memory", "quick": options.quick, **found}))


if __name__ == "__main__":
    main()
