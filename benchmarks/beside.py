"""What a frozen global adapter beside the trainable one costs a training step: ours, and peft's two adapters.

    python benchmarks/beside.py [--quick]

A LLaMA of 34 million random parameters, LoRA of rank 16 on every linear layer, the frozen part of rank 64; 256 tokens, one
thread.
Steps of the variants take turns, and each figure is the ratio of the fastest steps to that with the trainable adapter alone.

- `ours_over_alone`: the frozen part as `client.model.FrozenHook` adds it.
- `peft_over_alone`: as a second, frozen adapter of peft that is active, too.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

RANK, FROZEN_RANK, TOKENS = 16, 64, 256


def stepper(folder: str, number_format: str, kind: str) -> Callable[[], float]:
    """A function that takes a step and says how long it took."""
    import numpy as np
    import torch

    from lamina.client.data import Example
    from lamina.client.frozen import Frozen
    from lamina.client.loading import BaseOptions, load_base
    from lamina.client.losses import collate, losses
    from lamina.client.model import put, trainable_parameters, training_mode
    from lamina.protos.adapter import Adapter, LoraFactors

    base = load_base(BaseOptions(folder, format=number_format, compute="fp32", device="cpu"))
    rng = np.random.default_rng(0)

    def factors(rank: int) -> Any:
        return {
            module: LoraFactors(
                rng.normal(size=(min(rank, *sides), sides[1])).astype(np.float32) * 0.01,
                rng.normal(size=(sides[0], min(rank, *sides))).astype(np.float32) * 0.01,
                1.0,
            )
            for module, sides in base.spec.modules.items()
        }

    local, glob = Adapter(factors(RANK)), factors(FROZEN_RANK)
    beside = Frozen({m: (torch.tensor(f.A), torch.tensor(f.B)) for m, f in glob.items()}, "x")
    put(base, local, beside if kind == "ours" else None)
    if kind == "peft":
        from peft import LoraConfig

        targets = list(base.spec.modules)
        base.model.add_adapter("glob", LoraConfig(r=FROZEN_RANK, lora_alpha=FROZEN_RANK, target_modules=targets))
        base.model.base_model.set_adapter(["default", "glob"])
        for name, parameter in base.model.named_parameters():
            parameter.requires_grad_(".default." in name and "lora_" in name)
    parameters = list(trainable_parameters(base).values())
    batch = collate([Example(rng.integers(2, 1000, TOKENS).astype(np.int32), np.ones(TOKENS, bool))], 0, base.device)

    def step() -> float:
        started = time.perf_counter()
        with training_mode(base):
            summed, _, count = losses(base, batch)
            (summed / count).backward()
        for parameter in parameters:
            parameter.grad = None
        return time.perf_counter() - started

    return step


def main() -> int:
    """Run it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="fewer steps; RESULTS.md is left alone")
    quick = parser.parse_args().quick
    import torch

    from benchmarks.memory import model_at
    from benchmarks.results import write_section

    torch.set_num_threads(1)
    folder, lines = str(model_at("34M", "fp32", "")), []
    for number_format in ("fp32", "nf4"):
        steps = {kind: stepper(folder, number_format, kind) for kind in ("alone", "ours", "peft")}
        times: dict[str, list[float]] = {kind: [] for kind in steps}
        for _ in range(4 if quick else 25):
            for kind, step in steps.items():
                times[kind].append(step())
        fastest = {kind: min(found[1:]) for kind, found in times.items()}
        ours, peft = fastest["ours"] / fastest["alone"], fastest["peft"] / fastest["alone"]
        print(
            f"{number_format}: ours_over_alone {ours:.3f}, peft_over_alone {peft:.3f}, alone {fastest['alone']:.3f} s"
        )
        lines.append(f"| {number_format} | {ours:.2f} | {peft:.2f} | {fastest['alone']:.3f} |")
    if not quick:
        head = ["| base | ours_over_alone | peft_over_alone | alone, seconds |", "|---|---|---|---|"]
        told = (__doc__ or "").split("\n\n", 2)[2].strip()
        write_section("beside", "python benchmarks/beside.py", "\n".join([told, "", *head, *lines]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
