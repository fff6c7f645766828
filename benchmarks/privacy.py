"""What privacy costs in time: a DP step beside a plain LoRA step and beside Opacus, and a secure sum of ten clients.

The step: a LLaMA of hidden size 256 with 4 layers, LoRA of rank 16 on every linear layer, 16 rows of 128 tokens, one thread. Each
arm takes whole optimizer steps of AdamW, four in a turn (a round), on a model of its own: ours with clipping row by row and the
deployment's noise, the plain one as a client trains without privacy, and Opacus with hooks and with ghost clipping, with its own
noise and the same loss by row. Arms take turns; a ratio is the median over turns of two arms' CPU time in one turn.

The secure sum: ten clients with certificates' keys, ten million numbers each; one is lost after it has sent its shares, so that
its masks must be rebuilt. CPU time of a client (the mean) and of the coordinator, without network and encoding.

    python benchmarks/privacy.py [--quick]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

ROWS, TOKENS, RANK, STEPS = 16, 128, 16, 4
CLIENTS, NUMBERS = 10, 10_000_000
Step = Callable[[], None]


def saved_model(folder: Path) -> Path:
    """A random LLaMA with the tokenizer of the shipped base."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.models import add_tokenizer

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024, hidden_size=256, intermediate_size=688, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=True, pad_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return add_tokenizer(folder)


def loaded(folder: Path) -> Any:
    """A base with an adapter of the benchmark's rank in its slots."""
    from lamina.client.loading import BaseOptions, load_base
    from lamina.client.model import put
    from lamina.client.train import Task, completed
    from lamina.protos.adapter import Adapter
    from lamina.protos.config import TrainConfig

    base = load_base(BaseOptions(source=str(folder)))
    ranks, scales = dict.fromkeys(base.spec.modules, RANK), dict.fromkeys(base.spec.modules, 2.0)
    put(base, completed(Adapter(), ranks, scales, Task("bench", 1, 1, 0, TrainConfig()), base), None)
    return base


def examples() -> list[Any]:
    import numpy as np

    from lamina.client.data import Example

    rng = np.random.default_rng(0)
    targets = np.ones(TOKENS, bool)
    targets[0] = False
    return [Example(rng.integers(2, 1024, TOKENS).astype(np.int32), targets, row=row) for row in range(ROWS)]


def settings() -> Any:
    from lamina.protos.config import TrainConfig

    return TrainConfig(local_steps=STEPS, batch_size=ROWS, max_length=TOKENS, learning_rate=1e-4, schedule="constant")


def plain(base: Any) -> Step:
    from lamina.client.train import Task, train
    from lamina.protos.adapter import EMPTY

    some, task = examples(), Task("bench", 1, 1, 0, settings())
    return lambda: void(train(base, some, task, EMPTY))


def ours(base: Any) -> Step:
    from lamina.client.private.train import Private, train_privately
    from lamina.client.train import Task
    from lamina.protos.adapter import EMPTY
    from lamina.protos.privacy.mechanism import Mechanism
    from lamina.protos.privacy.noise import secret

    # A rate of 1, so that every step has the same rows as the other arms'.
    mechanism = Mechanism("record", 1.0, float(ROWS), 1.0, 1.0, STEPS, 1, 0.0, 1e-5)
    private = Private(mechanism, ROWS, lambda purpose, client, round_number: secret())
    some, task = examples(), Task("bench", 1, 1, 0, settings())
    return lambda: void(train_privately(base, some, task, private, EMPTY))


def times_over(one: Step) -> Step:
    """As many steps as a round of the other arms has."""

    def several() -> None:
        for _ in range(STEPS):
            one()

    return several


def void(_: Any) -> None:
    """Nothing of it is wanted."""


def rows_and_targets(base: Any) -> tuple[Any, Any]:
    from lamina.client.losses import collate, pad_id

    batch = collate(examples(), pad_id(base), base.device)
    return batch.tokens, batch.targets[:, 1:]


def opacus_hooks(base: Any) -> Step:
    import torch
    from opacus import GradSampleModule
    from opacus.optimizers import DPOptimizer

    from lamina.client.model import trainable_parameters

    base.model.train()
    module = GradSampleModule(base.model, loss_reduction="sum", strict=False)
    inner = torch.optim.AdamW(list(trainable_parameters(base).values()), lr=1e-4)
    optimizer = DPOptimizer(
        inner, noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=ROWS, loss_reduction="sum"
    )
    tokens, targets = rows_and_targets(base)

    def one() -> None:
        optimizer.zero_grad(set_to_none=True)
        logits = module(input_ids=tokens, use_cache=False).logits[:, :-1].float()
        nats = torch.nn.functional.cross_entropy(
            logits.reshape(-1, logits.shape[-1]), targets.reshape(-1), reduction="sum"
        )
        (nats / targets.shape[1]).backward()  # rows of one length: the sum of their means
        optimizer.step()

    return times_over(one)


def opacus_ghost(base: Any) -> Step:
    import torch
    from opacus.grad_sample import GradSampleModuleFastGradientClipping
    from opacus.optimizers import DPOptimizerFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping

    from lamina.client.model import trainable_parameters

    base.model.train()
    module = GradSampleModuleFastGradientClipping(
        base.model, loss_reduction="sum", strict=False, max_grad_norm=1.0, use_ghost_clipping=True
    )
    inner = torch.optim.AdamW(list(trainable_parameters(base).values()), lr=1e-4)
    optimizer = DPOptimizerFastGradientClipping(
        inner, noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=ROWS, loss_reduction="sum"
    )
    criterion = DPLossFastGradientClipping(
        module, optimizer, torch.nn.CrossEntropyLoss(reduction="sum", ignore_index=-100), loss_reduction="sum"
    )
    tokens, targets = rows_and_targets(base)

    def one() -> None:
        optimizer.zero_grad(set_to_none=True)
        logits = module(input_ids=tokens, use_cache=False).logits[:, :-1].float()
        loss = criterion(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1), shape=logits.shape)
        loss.backward()
        optimizer.step()

    return times_over(one)


ARMS: dict[str, Callable[[Any], Step]] = {
    "plain": plain, "ours": ours, "opacus_hooks": opacus_hooks, "opacus_ghost": opacus_ghost,
}  # fmt: skip


def step_times(turns: int) -> dict[str, list[float]]:
    """CPU seconds of a step by arm, turn by turn."""
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = saved_model(Path(temporary) / "model")
        steps = {name: arm(loaded(folder)) for name, arm in ARMS.items()}
    for step in steps.values():  # once, unmeasured
        step()
    found: dict[str, list[float]] = {name: [] for name in steps}
    order = list(steps)
    for turn in range(turns):
        for name in order if turn % 2 else reversed(order):
            began = time.process_time()
            steps[name]()
            found[name].append((time.process_time() - began) / STEPS)
    return found


def ratio(times: dict[str, list[float]], name: str) -> float:
    """Ours over another arm: the median over turns."""
    return statistics.median(mine / theirs for mine, theirs in zip(times["ours"], times[name], strict=True))


def secure_sum(numbers: int) -> tuple[float, float]:
    """CPU seconds of a client and of the coordinator."""
    from lamina.protos.secagg import client, server
    from tests.masking import STAGES, attempt, summed

    one = attempt(CLIENTS, length=numbers)
    lost, spent = one.context.names[3], {"client": 0.0, "server": 0.0}

    def timed(whose: str, action: Callable[[], Any]) -> Any:
        began = time.process_time()
        found = action()
        spent[whose] += time.process_time() - began
        return found

    state: Any = server.begin(one.context, numbers)
    told: Any = dict.fromkeys(one.context.names)
    states: dict[str, Any] = {}
    for stage in STAGES:
        for name, message in told.items():
            if name == lost and stage not in ("keys", "shares"):
                continue
            if stage == "keys":
                states[name], answer = timed(
                    "client", lambda n=name: client.begin(one.context, one.me(n), one.vectors[n])
                )
            else:
                states[name], answer = timed("client", lambda n=name, m=message: client.advance(states[n], m))
            state = timed("server", lambda s=state, n=name, a=answer: server.receive(s, n, a))
        if stage != STAGES[-1]:
            state, told = timed("server", lambda s=state: server.advance(s))
    total = timed("server", lambda: server.total(state))
    if not (total == summed(one, [name for name in one.context.names if name != lost])).all():
        raise SystemExit("the secure sum is not the sum")
    return spent["client"] / (CLIENTS - 1), spent["server"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer turns, and a secure sum of a million numbers")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    from lamina.client.model import quiet

    quiet()
    times = step_times(5 if options.quick else 15)
    figures: dict[str, Any] = {f"dp_step_vs_{name}": ratio(times, name) for name in times if name != "ours"}
    numbers = NUMBERS // 10 if options.quick else NUMBERS
    figures["secagg_client_s"], figures["secagg_server_s"] = secure_sum(numbers)
    milliseconds = {name: 1e3 * statistics.median(some) for name, some in times.items()}
    lines = ["| step | CPU time (ms) | ours / it |", "|---|---|---|"]
    lines += [
        f"| {name} | {milliseconds[name]:.0f} | {'' if name == 'ours' else format(figures[f'dp_step_vs_{name}'], '.3f')} |"
        for name in times
    ]
    lines += [
        "",
        f"A secure sum of {CLIENTS} clients x {numbers:,} numbers with one dropout: {figures['secagg_client_s']:.2f} s at a "
        f"client, {figures['secagg_server_s']:.2f} s at the coordinator.",
        "",
        f"- {'holds' if figures['dp_step_vs_plain'] <= 1.10 else 'DOES NOT HOLD'}: dp_step_vs_plain <= 1.10",
    ]
    for name in ("opacus_hooks", "opacus_ghost"):
        lines.append(f"- {'holds' if figures[f'dp_step_vs_{name}'] < 1 else 'DOES NOT HOLD'}: dp_step_vs_{name} < 1")
    print("\n".join(lines))
    if not options.quick:
        from results import write_section

        write_section("privacy", "python benchmarks/privacy.py", "\n".join(lines))
    print(json.dumps({"benchmark": "privacy", "quick": options.quick, **figures}))


if __name__ == "__main__":
    main()
