"""Local training: an explicit loop on whatever the slots hold. Losses are sums over tokens divided by the step's tokens, so
accumulation over micro-batches equals one large batch.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lamina.client import resident
from lamina.client.data import Example
from lamina.client.losses import IGNORED, Batch, collate, longest, losses, pad_id, padded_length
from lamina.client.model import Base, core_of, set_checkpointing, trainable_parameters, training_mode
from lamina.protos import seeds
from lamina.protos.adapter import Adapter, Array, LoraFactors, folded
from lamina.protos.config import TrainConfig
from lamina.protos.errors import ConfigError, TrainingError

Optimizer = Mapping[str, torch.Tensor]


def learning_rate(config: TrainConfig, step: int, steps: int) -> float:
    """The rate at one optimizer step of the campaign.

    Args:
        config: Peak, warm-up, schedule.
        step: From 0, over all rounds.
        steps: Of the whole campaign.

    Returns:
        Linear warm-up times constant or cosine to `final_learning_rate` of the peak.
    """
    warm = min(1.0, (step + 1) / (config.warmup_steps + 1))
    if config.schedule == "constant":
        return config.learning_rate * warm
    share = min(1.0, max(0.0, (step - config.warmup_steps) / max(1, steps - config.warmup_steps)))
    cosine = config.final_learning_rate + (1 - config.final_learning_rate) * 0.5 * (1 + math.cos(math.pi * share))
    return config.learning_rate * warm * cosine


def set_rate(optimizer: torch.optim.Optimizer, task: Task, step: int) -> None:
    """Set the rate of one step of a client's round.

    Args:
        optimizer: Changed in place.
        task: Round, rounds, schedule.
        step: From 0, in the round.
    """
    done = (task.round - 1) * task.config.local_steps
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(task.config, done + step, task.rounds * task.config.local_steps)


def batches(examples: Sequence[Example], size: int, rng: np.random.Generator) -> Iterator[list[Example]]:
    """Endless batches, each pass over the examples in a new order.

    Args:
        examples: At least one.
        size: Examples in a batch.
        rng: Of the order.

    Yields:
        `size` examples; a pass may end within a batch.
    """
    queue: list[int] = []
    while True:
        while len(queue) < size:
            queue.extend(int(index) for index in rng.permutation(len(examples)))
        yield [examples[index] for index in queue[:size]]
        queue = queue[size:]


@dataclass(frozen=True)
class Task:
    """One client's share of one round.

    Attributes:
        client_id: Whose.
        round: From 1.
        rounds: Of the campaign.
        seed: Of the run.
        config: Local training settings.
    """

    client_id: str
    round: int
    rounds: int
    seed: int
    config: TrainConfig


def train(
    base: Base,
    examples: Sequence[Example],
    task: Task,
    start: Adapter,
    kept: Optimizer | None = None,
    progress: Callable[[int, float], None] | None = None,
) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Train what is in the slots for one round.

    Args:
        base: With the start in its slots; changed in place.
        examples: The client's training set.
        task: Round, seed, settings.
        start: What is in the slots, for the proximal term.
        kept: Optimizer state of an earlier round, or None for a fresh one.
        progress: Called after each step with its number and loss.

    Returns:
        Metrics (`train_loss` in nats per target, the mean over steps; `tokens`; `seconds`; `peak_bytes`, the most that this
        process held meanwhile, where the system says it), and the optimizer state.

    Raises:
        TrainingError: If a loss is not finite.
    """
    config, started = task.config, time.monotonic()
    resident.forget_peak(base.device.type)
    if config.checkpointing is not None:
        set_checkpointing(base, config.checkpointing)
    parameters = trainable_parameters(base)
    optimizer = optimizer_of(config, list(parameters.values()))
    if kept:
        restore(optimizer, parameters, kept)
    torch.manual_seed(seeds.integer(task.seed, "dropout", task.client_id, task.round))
    stream = batches(examples, config.batch_size, seeds.stream(task.seed, "batches", task.client_id, task.round))
    step_losses, tokens = [], 0
    anchor = anchored(start, base) if config.proximal > 0 else {}
    with training_mode(base):
        for step in range(config.local_steps):
            set_rate(optimizer, task, step)
            drawn = [next(stream) for _ in range(config.accumulation)]
            loss, count = _step(base, _cut(drawn, config.micro_batch), task, anchor, step)
            if config.max_grad_norm > 0:
                torch.nn.utils.clip_grad_norm_(parameters.values(), config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step_losses.append(loss)
            tokens += count
            if progress is not None:
                progress(step + 1, loss)
    metrics = {
        "train_loss": float(np.mean(step_losses)),
        "tokens": float(tokens),
        "seconds": time.monotonic() - started,
    }
    if peak := resident.peak(base.device.type):
        metrics["peak_bytes"] = float(peak)
    return metrics, saved(optimizer, parameters)


def optimizer_of(config: TrainConfig, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer that a config names.

    Args:
        config: Name, weight decay.
        parameters: What it moves.

    Returns:
        A fresh one.

    Raises:
        ConfigError: If its library is not installed.
    """
    if config.optimizer in ("auto", "adamw"):
        return torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
    try:
        from bitsandbytes import optim
    except ImportError:
        raise ConfigError(
            f"train.optimizer={config.optimizer}: expected bitsandbytes to be installed. Run `pip install bitsandbytes`, or take "
            "adamw."
        ) from None
    kind = optim.PagedAdamW8bit if config.optimizer == "paged_adamw8bit" else optim.AdamW8bit
    return kind(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)  # type: ignore[no-any-return]


def _cut(drawn: Sequence[Sequence[Example]], size: int | None) -> list[Sequence[Example]]:
    """Batches in pieces of a size; the gradient of all is the same."""
    return [batch[at : at + (size or len(batch))] for batch in drawn for at in range(0, len(batch), size or len(batch))]


def _step(
    base: Base,
    micro: Sequence[Sequence[Example]],
    task: Task,
    anchor: Mapping[str, tuple[torch.Tensor, ...]],
    step: int,
) -> tuple[float, int]:
    """Gradients of one optimizer step; its loss and number of targets."""
    prepared = [
        collate(some, pad_id(base), base.device, padded_length(base, longest(some), task.config.max_length))
        for some in micro
    ]
    count = sum(_num_targets(batch) for batch in prepared)
    total = 0.0
    for batch in prepared:
        with autocast(base.device, task.config.precision):
            summed, _, _ = losses(base, batch)
        (summed / max(1, count)).backward()  # type: ignore[no-untyped-call]
        total += float(summed.detach())
    loss = total / max(1, count)
    if not math.isfinite(loss):
        raise TrainingError(
            f"client {task.client_id}, round {task.round}, step {step + 1}: expected a finite loss, got {loss}. "
            "Lower train.learning_rate, or set train.max_grad_norm. Completed rounds are kept: resume from them."
        )
    if anchor:
        (0.5 * task.config.proximal * proximal_term(base, anchor)).backward()  # type: ignore[no-untyped-call]
    return loss, count


def _num_targets(batch: Batch) -> int:
    if batch.targets.dim() == 1:
        return int(batch.targets.numel())
    return int((batch.targets[:, 1:] != IGNORED).sum())


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[None]:
    """bf16 autocast where asked for or, with `auto`, where the accelerator has it; nothing otherwise.

    Args:
        device: Of the model.
        precision: `auto`, `fp32` or `bf16`.

    Returns:
        A context manager.
    """
    able = device.type == "cuda" and torch.cuda.is_bf16_supported()
    if precision == "bf16" or (precision == "auto" and able):
        return torch.autocast(device.type, torch.bfloat16)
    return contextlib.nullcontext()


def anchored(start: Adapter, base: Base) -> dict[str, tuple[torch.Tensor, ...]]:
    """What the proximal term holds on to.

    Args:
        start: What training starts from.
        base: For the device.

    Returns:
        Module -> (A, B), dense name -> (values,).
    """
    anchor: dict[str, tuple[torch.Tensor, ...]] = {
        module: tuple(torch.tensor(values, dtype=torch.float32, device=base.device) for values in (f.A, f.B))
        for module, f in ((module, folded(f)) for module, f in start.lora.items())
    }
    return anchor | {name: (torch.tensor(value, device=base.device),) for name, value in start.dense.items()}


def proximal_term(base: Base, anchor: Mapping[str, tuple[torch.Tensor, ...]]) -> torch.Tensor:
    """Squared distance of products from the release, by r x r Gram matrices; independent of how a product is factored.

    Args:
        base: With what is trained in its slots.
        anchor: See `anchored`.

    Returns:
        A scalar with gradient.
    """
    total = torch.zeros((), device=base.device)
    for name, then in anchor.items():
        if len(then) == 1:
            total = total + (base.parameter(name) - then[0]).square().sum()
            continue
        layer = base.layer(name)
        rows, columns = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        core = core_of(layer.lora_B["default"])
        columns = columns if core is None else columns @ core.weight
        left, right = torch.cat([columns, -then[1]], dim=1), torch.cat([rows, then[0]])
        total = total + layer.scaling["default"] ** 2 * ((left.T @ left) * (right @ right.T)).sum()
    return total


def saved(optimizer: torch.optim.Optimizer, parameters: Mapping[str, torch.nn.Parameter]) -> dict[str, torch.Tensor]:
    """An optimizer's state, as copies on the processor.

    Args:
        optimizer: Any.
        parameters: By name.

    Returns:
        `<name>/<key>` -> tensor.
    """
    saved = {}
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            saved[f"{name}/{key}"] = torch.as_tensor(value).detach().cpu().clone()
    return saved


def restore(optimizer: torch.optim.Optimizer, parameters: Mapping[str, torch.nn.Parameter], kept: Optimizer) -> None:
    """Take up what `saved` gave; state of another shape is left.

    Args:
        optimizer: A fresh one.
        parameters: By name.
        kept: Its earlier state.
    """
    for name, parameter in parameters.items():
        state = {key.rsplit("/", 1)[1]: value.clone() for key, value in kept.items() if key.rsplit("/", 1)[0] == name}
        if state and state["exp_avg"].shape == parameter.shape:
            moved = {key: value if key == "step" else value.to(parameter.device) for key, value in state.items()}
            optimizer.state[parameter] = moved


def fresh_rows(seed: int, client_id: str, round_number: int, module: str, shape: tuple[int, int]) -> Array:
    """The first A of slots that a release does not fill; whoever knows the run's seed can draw them too.

    Args:
        seed: Of the run.
        client_id: Who trains them.
        round_number: When.
        module: In which module.
        shape: How many rows, and their length d_in.

    Returns:
        Of that shape, float32, uniform in +-1/sqrt(d_in).
    """
    bound = 1.0 / math.sqrt(shape[1])
    rng = seeds.stream(seed, "slots", client_id, round_number, module)
    return rng.uniform(-bound, bound, shape).astype(np.float32)


def completed(
    release: Adapter, budget_ranks: Mapping[str, int], scales: Mapping[str, float], task: Task, base: Base
) -> Adapter:
    """The adapter to train: the released prefix, and fresh slots up to the client's rank.

    A fresh slot has B = 0 and A uniform in +-1/sqrt(d_in) (Kaiming, as in peft), seeded by run, client, round and module, so
    that the product is that of the prefix and every slot gets a gradient within two steps.

    Args:
        release: Decoded trainable part, at the client's scales.
        budget_ranks: Module -> rank that the client trains.
        scales: Module -> scale.
        task: For the seed.
        base: For the shapes.

    Returns:
        An adapter of exactly the client's ranks.
    """
    lora = {}
    for module, rank in budget_ranks.items():
        d_out, d_in = base.spec.modules[module]
        got = release.lora.get(module)
        if got is not None and got.core is not None:
            lora[module] = got  # whole: a core has no slots that are not there yet
            continue
        known = 0 if got is None else got.rank
        rows = fresh_rows(task.seed, task.client_id, task.round, module, (rank - known, d_in))
        columns = np.zeros((d_out, rank - known), np.float32)
        if got is not None:
            rows, columns = np.concatenate([got.A, rows]), np.concatenate([got.B, columns], axis=1)
        lora[module] = LoraFactors(rows, columns, scales[module])
    return Adapter(lora, release.dense)
