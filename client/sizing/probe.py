"""A few training steps in a process of their own: what they take of memory and time on this machine.

A process that the system ends for want of memory is an answer: what was tried does not fit.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from lamina.client.hardware import Speed
from lamina.client.sizing.limit import release
from lamina.protos.errors import ConfigError

_LIMIT_S = 900.0


@dataclass(frozen=True)
class Trial:
    """What to try.

    Attributes:
        source: A base, see `model.source`.
        format: Number format of its linear layers.
        compute: Of the activations, or `auto`.
        rank: Of every adapted layer.
        batch_size: Examples in a forward pass.
        length: Tokens in an example.
        checkpointing: Whether activations are computed again.
        steps: How many are taken; the first is not timed.
        threads: Of the processor; 0 leaves the default.
        target_modules: Suffixes, or `all-linear`.
        device: As `train.device`.
        limit_bytes: The most that it may take beyond the imports, see `limit.limit_increment`; 0 for any.
    """

    source: str
    format: str = "fp32"
    compute: str = "auto"
    rank: int = 8
    batch_size: int = 1
    length: int = 256
    checkpointing: bool = False
    steps: int = 2
    threads: int = 0
    target_modules: Any = "all-linear"
    device: str = "cpu"
    limit_bytes: int = 0


@dataclass(frozen=True)
class Measured:
    """What a trial took.

    Attributes:
        increment_bytes: Peak of resident memory above that after the imports; on an accelerator, the peak of what was reserved.
        step_s: Fastest step.
        tokens: Of a step.
    """

    increment_bytes: int
    step_s: float
    tokens: int


def measure(trial: Trial) -> Measured | None:
    """Try it.

    Args:
        trial: What.

    Returns:
        What it took, or None where it did not fit.

    Raises:
        ConfigError: If the base cannot be trained so for another reason.
    """
    command = [sys.executable, "-m", "lamina.client.sizing.probe", json.dumps(asdict(trial))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            out, err = process.communicate(timeout=_LIMIT_S)
        except subprocess.TimeoutExpired:
            raise ConfigError(
                f"probe: expected some steps within {_LIMIT_S:g} s. Try a shorter train.max_length."
            ) from None
        finally:
            process.kill()  # nothing where it has ended
            process.wait()
            if trial.limit_bytes:
                release(process.pid)
    lines = out.strip().splitlines()
    if process.returncode == 0 and lines:
        found = json.loads(lines[-1])
        return None if found is None else Measured(**found)
    if process.returncode < 0:
        return None  # ended for want of memory, by the system or by the limit
    raise ConfigError(f"probe: {(err.strip().splitlines() or ['no reason was given'])[-1][:500]}")


def speed(short: Measured, long: Measured) -> Speed:
    """Seconds of a step by its tokens, from two trials.

    Args:
        short: Of few tokens.
        long: Of more.

    Returns:
        The line through both; never falling.
    """
    token_s = max(1e-9, (long.step_s - short.step_s) / max(1, long.tokens - short.tokens))
    return Speed(max(0.0, short.step_s - token_s * short.tokens), token_s)


def _tried(trial: Trial) -> Measured | None:
    """In the process of its own."""
    import torch

    from lamina.client.loading import BaseOptions, load_base
    from lamina.client.model import put, quiet
    from lamina.client.resident import forget_peak, peak_bytes, resident_bytes
    from lamina.client.sizing.limit import limit_increment
    from lamina.client.train import Task, completed, train
    from lamina.protos.adapter import EMPTY
    from lamina.protos.allocator import give_back
    from lamina.protos.config import TrainConfig

    give_back(1)
    quiet()
    if trial.format in ("nf4", "int8", "mixed"):
        import bitsandbytes  # noqa: F401  an import, not the base's
    if trial.threads:
        torch.set_num_threads(trial.threads)
    if trial.limit_bytes:
        limit_increment(trial.limit_bytes)
    before = resident_bytes()
    forget_peak()
    try:
        base = load_base(
            BaseOptions(
                trial.source,
                format=trial.format,
                compute=trial.compute,
                checkpointing=trial.checkpointing,
                target_modules=trial.target_modules,
                device=trial.device,
            )
        )
        ranks = {module: base.spec.clamped(trial.rank, module) for module in base.spec.modules}
        config = TrainConfig(local_steps=trial.steps, batch_size=trial.batch_size, max_length=trial.length)
        task = Task("probe", 1, 1, 0, config)
        start = completed(EMPTY, ranks, dict.fromkeys(ranks, 2.0), task, base)
        put(base, start, None)
        del start
        times: list[float] = []
        last = time.monotonic()

        def progress(step: int, loss: float) -> None:
            nonlocal last
            now = time.monotonic()
            times.append(now - last)
            last = now

        train(base, _examples(base.vocab, trial), task, EMPTY, None, progress)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError) or "memory" in str(error).lower() or "alloc" in str(error).lower():
            return None
        raise
    used = peak_bytes() - before
    if base.device.type == "cuda":
        used = torch.cuda.max_memory_reserved()
    return Measured(used, min(times[1:] or times), trial.batch_size * trial.length)


def _examples(vocab: int, trial: Trial) -> list[Any]:
    import numpy as np

    from lamina.client.data import Example

    rng = np.random.default_rng(0)
    return [
        Example(rng.integers(0, vocab, trial.length, np.int32), np.ones(trial.length, bool))
        for _ in range(2 * trial.batch_size)
    ]


def _main(text: str) -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    document: Mapping[str, Any] = json.loads(text)
    found = _tried(Trial(**document))
    print(json.dumps(None if found is None else asdict(found)))


if __name__ == "__main__":
    _main(sys.argv[1])
