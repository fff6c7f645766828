"""The server: rounds of one adapter out and back, with the seconds of each written to a file."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from flwr.app import ArrayRecord, Context, Message, MessageType, RecordDict
from flwr.serverapp import Grid, ServerApp

app = ServerApp()
ITEM_BYTES = 4


@app.main()
def main(grid: Grid, context: Context) -> None:
    config = context.run_config
    clients, poll_s = int(config["clients"]), float(config["poll-s"])
    adapter = first(int(config["num-bytes"]), int(config["arrays"]))
    nodes: list[int] = []
    while len(nodes) < clients:
        time.sleep(0.2)
        nodes = list(grid.get_node_ids())
    rounds = []
    for number in range(1, int(config["rounds"]) + 1):
        start = time.monotonic()
        content = RecordDict({"arrays": ArrayRecord(adapter)})
        messages = [Message(content, node, MessageType.TRAIN, group_id=str(number)) for node in nodes[:clients]]
        replies = list(exchanged(grid, messages, poll_s))
        received = time.monotonic()
        adapter = mean([reply.content["arrays"].to_numpy_ndarrays() for reply in replies])
        rounds.append({"exchange_s": received - start, "mean_s": time.monotonic() - received, "replies": len(replies)})
    output = Path(str(config["output"]))
    output.with_suffix(".part").write_text(json.dumps(rounds))
    os.replace(output.with_suffix(".part"), output)


def exchanged(grid: Grid, messages: list[Message], poll_s: float) -> Iterable[Message]:
    """Replies to all messages: as strategies wait for them (every 3 s), or asking more often."""
    if not poll_s:
        return grid.send_and_receive(messages)
    waiting, replies = set(grid.push_messages(messages)), []
    while waiting:
        for reply in grid.pull_messages(waiting):
            waiting.discard(reply.metadata.reply_to_message_id)
            replies.append(reply)
        if waiting:
            time.sleep(poll_s)
    return replies


def first(num_bytes: int, count: int) -> list[np.ndarray]:
    """Random float32 arrays of this many bytes in all, or one number where that is 0."""
    if num_bytes < ITEM_BYTES * count:
        return [np.zeros(1, np.float32)]
    rng = np.random.default_rng(0)
    return [rng.random(num_bytes // ITEM_BYTES // count, dtype=np.float32) for _ in range(count)]


def mean(updates: list[list[np.ndarray]]) -> list[np.ndarray]:
    """The plain mean of the clients' arrays; all of them have the same number of examples."""
    return [np.mean(same, axis=0, dtype=np.float32) for same in zip(*updates, strict=True)]
