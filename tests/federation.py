"""A federation without torch: synthetic clients that answer by numpy, and clients that attack."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from lamina.protos import seeds
from lamina.protos.adapter import Adapter, LoraFactors
from lamina.protos.blobs import blob
from lamina.protos.codec import decode, encode_update
from lamina.protos.messages import Budget, Instruction, Reply, Update
from lamina.protos.spec import AdapterSpec
from lamina.server.admission import HEADER_BYTES
from lamina.server.campaign import Campaign
from lamina.server.channel import Channel, MemoryChannel, Respond
from lamina.server.rounds import Loop, run_round
from lamina.server.store.base import Completed, Evaluation
from lamina.strategies import Options, ServerState, build

MODULES: Mapping[str, tuple[int, int]] = {"block.q_proj": (9, 7), "block.up_proj": (6, 11)}
SCALE = 2.0
RUN_ID = "run"
Attack = Callable[[Instruction, Update], bytes]


def spec() -> AdapterSpec:
    return AdapterSpec(MODULES, dense={"head.weight": np.linspace(-1, 1, 6, dtype=np.float32).reshape(2, 3)})


def budget(rank: int) -> Budget:
    return Budget(dict.fromkeys(MODULES, rank), dict.fromkeys(MODULES, 6), dict.fromkeys(MODULES, SCALE))


def campaign(strategy: str = "recompress", ranks: Sequence[int] = (4, 3, 2), **more: object) -> Campaign:
    budgets = {str(index): budget(rank) for index, rank in enumerate(ranks)}
    largest = max(ranks)
    options = Options(dict.fromkeys(MODULES, largest), dict.fromkeys(MODULES, SCALE), rank_cap=6)
    made = Campaign(RUN_ID, spec(), build(strategy, options), budgets, dict.fromkeys(budgets, 1), 3)
    return replace(made, **more)  # type: ignore[arg-type]


def trained(one: Campaign, instruction: Instruction, seed: int = 0) -> Update:
    """What an honest client sends: its release, completed to its rank and moved a little."""
    release = decode(instruction.release.read())
    mine, client = one.budgets[instruction.client_id], instruction.client_id
    rng = seeds.stream(seed, "client", client, instruction.round)
    lora = {}
    for module, rank in mine.train.items():
        d_out, d_in = one.spec.modules[module]
        rows, columns = rng.normal(size=(rank, d_in)), rng.normal(size=(d_out, rank)) * 0.1
        got = release.lora.get(module)
        if got is not None:
            rows[: got.rank] = rows[: got.rank] * 0.1 + got.A
            columns[:, : got.rank] += got.B
        lora[module] = LoraFactors(rows.astype(np.float32), columns.astype(np.float32), mine.scale[module])
    dense = {
        name: (release.dense.get(name, first) + rng.normal(size=first.shape) * 0.1).astype(np.float32)
        for name, first in one.spec.dense.items()
    }
    return Update(
        instruction.run_id,
        instruction.round,
        client,
        instruction.release_hash,
        Adapter(lora, dense),
        num_examples=10 + int(client),
        metrics={"train_loss": 1.0, "seconds": 0.5},
    )


def reply(client_id: str, content: bytes) -> Reply:
    return Reply(client_id, blob(content))


def honest(one: Campaign) -> Respond:
    return lambda instruction: reply(instruction.client_id, encode_update(trained(one, instruction), "fp32"))


def attacker(one: Campaign, attack: Attack) -> Respond:
    return lambda instruction: reply(instruction.client_id, attack(instruction, trained(one, instruction)))


def channel(one: Campaign, attacks: Mapping[str, Respond] | None = None) -> MemoryChannel:
    return MemoryChannel({client: honest(one) for client in one.budgets} | dict(attacks or {}))


def no_evaluation(state: ServerState, held: Mapping[str, int]) -> Evaluation | None:
    return None


def round_of(one: Campaign, channel: Channel, after: Completed | None = None) -> Completed:
    """The first round over a channel, or the one after another."""
    state, held = (after.state, after.held) if after else (one.strategy.init(one.spec), {})
    return run_round(Loop(one, channel, no_evaluation), state, held)


def one_round(one: Campaign, attacks: Mapping[str, Respond] | None = None) -> Completed:
    return round_of(one, channel(one, attacks))


def attacked(one: Campaign, attack: Attack) -> Completed:
    """A round in which client 2 attacks and the others are honest."""
    return one_round(one, {"2": attacker(one, attack)})


def reasons(completed: Completed) -> list[tuple[str, str]]:
    return [(entry["client_id"], entry["reason"]) for entry in completed.record["rejections"]]


def without_the_attacker(one: Campaign) -> Completed:
    return one_round(one, {"2": lambda _: None})


def changed(update: Update, **fields: object) -> bytes:
    return encode_update(replace(update, **fields), "fp32")  # type: ignore[arg-type]


def with_factors(update: Update, module: str, factors: LoraFactors) -> Update:
    lora = dict(update.adapter.lora) | {module: factors}
    return replace(update, adapter=Adapter(lora, update.adapter.dense))


def with_dense(update: Update, name: str, value: np.ndarray) -> Update:
    return replace(update, adapter=Adapter(update.adapter.lora, dict(update.adapter.dense) | {name: value}))


def oversized() -> bytes:
    return b"\x10" + bytes(7) + b"{" + b" " * (HEADER_BYTES * 3)


@dataclass
class Scripted:
    """A channel whose replies are made by a function from all instructions: repeats, strangers, any order."""

    script: Callable[[Sequence[Instruction]], Iterable[Reply]]
    offered: list[Instruction] = field(default_factory=list)

    def offer(self, instructions: Sequence[Instruction]) -> None:
        self.offered = list(instructions)

    def replies(self, until_s: float | None) -> Iterable[Reply]:
        return self.script(self.offered)
