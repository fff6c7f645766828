"""What a person sees of a run: bars over rounds, clients and steps on a terminal, and one line a round everywhere."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from lamina.server.store.base import Completed
from lamina.simulations.run import Finished

_HEAD = f"{'round':>9} {'clients':>7} {'train':>8} {'held-out':>9} {'worst':>8} {'up':>9} {'down':>9} {'error':>9} {'seconds':>8}"


def human(num_bytes: float) -> str:
    """Bytes for reading, in powers of ten.

    Args:
        num_bytes: How many.

    Returns:
        Such as `12.3 MB`.
    """
    for unit in ("B", "kB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} GB"


class Terminal:
    """An `engine.Watcher` that prints.

    Args:
        console: Where to.
        title: Such as the strategy's name.
    """

    def __init__(self, console: Console, title: str) -> None:
        self._console, self._title = console, title
        self._rounds = 0
        self._seen: set[tuple[str, int]] = set()
        self._progress: Progress | None = None
        self._bars: dict[str, Any] = {}

    def begin(self, rounds: int, names: Mapping[str, str], done: int) -> None:
        """Start the bars, where the console is a terminal."""
        self._rounds = rounds
        self._console.print(f"{self._title}: {len(names)} clients, rounds {done + 1} to {rounds}", style="bold")
        if self._console.is_terminal:
            columns = (TextColumn("{task.description:<22}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
            self._progress = Progress(*columns, TimeRemainingColumn(), console=self._console, transient=True)
            self._bars["round"] = self._progress.add_task("round", total=rounds, completed=done)
            self._bars["client"] = self._progress.add_task("client", total=len(names))
            self._bars["step"] = self._progress.add_task("step", total=None)
            self._progress.start()
        self._console.print(_HEAD, style="dim")

    def step(self, client_id: str, round_number: int, step: int, steps: int, loss: float) -> None:
        """Move the bars."""
        if self._progress is None:
            return
        if (client_id, round_number) not in self._seen:
            self._seen.add((client_id, round_number))
            this_round = sum(number == round_number for _, number in self._seen)
            self._progress.update(self._bars["client"], completed=this_round, description=f"client {client_id}")
        self._progress.update(self._bars["step"], completed=step, total=steps, description=f"step, loss {loss:.3f}")

    def completed(self, completed: Completed) -> None:
        """Print the round's line."""
        record = completed.record
        loss = "-" if record["loss"] is None else f"{record['loss']:.4f}"
        worst = "-" if record["loss_worst"] is None else f"{record['loss_worst']:.4f}"
        train = "-" if record["train_loss"] is None else f"{record['train_loss']:.4f}"
        self._console.print(
            f"{record['round']:>4}/{self._rounds:<4} {len(record['clients']):>7} {train:>8} {loss:>9} {worst:>8} "
            f"{human(record['bytes_up']):>9} {human(record['bytes_down']):>9} {record['relative_error']:>9.1e} "
            f"{record['seconds']:>8.1f}",
            highlight=False,
        )
        for rejection in record["rejections"]:
            self._console.print(f"  rejected client {rejection['client_id']}: {rejection['reason']}", style="yellow")
        if self._progress is not None:
            self._progress.update(self._bars["round"], completed=record["round"])

    def say(self, text: str) -> None:
        """Print a line."""
        self._console.print(text, style="dim", highlight=False)

    def end(self) -> None:
        """Take the bars away."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def table(finished: Sequence[Finished], titles: Sequence[str]) -> Table:
    """Finished runs side by side.

    Args:
        finished: The runs.
        titles: One for each.

    Returns:
        A rich table.
    """
    made = Table(title="held-out figures of the exported adapter on the full-precision base")
    private = any(one.summary["privacy"] for one in finished)
    classes = any(one.summary["eval"]["final_accuracy"] is not None for one in finished)
    heads = ["run", "base loss", "final loss", "change", "worst client", "up", "down", "aggregation error", "seconds"]
    if classes:
        heads[3:3] = ["accuracy"]
    if private:
        heads[-1:-1] = ["epsilon"]
    for index, head in enumerate(heads):
        # Only the runs' names are folded where room is short.
        made.add_column(
            head.replace(" ", "\n"), justify="right" if index else "left", overflow="fold", no_wrap=bool(index)
        )
    for one, title in zip(finished, titles, strict=True):
        figures, sent = one.summary["eval"], one.summary["communication"]
        worst = max(client["final_loss"] for client in figures["per_client"].values())
        cells = [
            title,
            f"{figures['base_loss']:.4f}",
            f"{figures['final_loss']:.4f}",
            f"{figures['final_loss'] - figures['base_loss']:+.4f}",
            f"{worst:.4f}",
            human(sent["bytes_up"]),
            human(sent["bytes_down"]),
            f"{one.summary['aggregation']['relative_error']:.1e}",
            f"{one.summary['seconds']['total']:.0f}",
        ]
        if classes:
            cells[3:3] = [f"{figures['base_accuracy']:.3f} -> {figures['final_accuracy']:.3f}"]
        if private:
            spent = (one.summary["privacy"] or {}).get("epsilon")
            cells[-1:-1] = ["-" if spent is None else f"{spent:.2f}"]
        made.add_row(*cells)
    return made


def over_seeds(finished: Sequence[Finished], titles: Sequence[str]) -> list[str]:
    """Mean and standard deviation of the final loss over the seeds of a sweep.

    Args:
        finished: The runs.
        titles: One for each, with `seed=N` among its words where seeds were swept.

    Returns:
        One line for each setting that was run with several seeds.
    """
    groups: dict[str, list[float]] = {}
    for one, title in zip(finished, titles, strict=True):
        rest = " ".join(word for word in title.split() if not word.startswith("seed="))
        groups.setdefault(rest, []).append(one.summary["eval"]["final_loss"])
    return [
        f"{rest or 'all runs'}: final loss {statistics.mean(losses):.4f} ± {statistics.stdev(losses):.4f} "
        f"over {len(losses)} seeds"
        for rest, losses in groups.items()
        if len(losses) > 1
    ]
