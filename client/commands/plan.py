"""`lamina plan`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from lamina.client.hardware import Profile, num_bytes, profile, size, what_if
from lamina.protos.errors import ConfigError
from lamina.protos.words import flag, parsed

if TYPE_CHECKING:  # torch takes seconds: help and wrong words are answered before
    from lamina.client.sizing.memory import Shape
    from lamina.client.sizing.planner import Plan, Wanted

_HELP = """\
usage: lamina plan [model=MODEL] [--what-if KIND:MEMORY] [key=value …] [--json]

What this machine is, and how it would train a model: number format, rank, batch, length. The model's configuration is enough, its
weights are not read. Nothing leaves the machine.

  model=tiny            a base: tiny, a directory (config.json will do), or a hub id
  rank=8                largest rank
  batch_size=8          examples of an optimizer step; kept whatever the plan
  max_length=128        tokens of an example
  local_steps=20        optimizer steps of a round
  deadline_s=           longest round, in seconds
  memory=               the most that training may take, such as 300MB
  formats=              number formats that are allowed, such as nf4,bf16
  download_rank=0       rank of the frozen part that comes beside the adapter
  compensation=0        rank of the base's compensation factors, where it is quantised
  device=auto           auto, cpu, cuda, mps, xpu
  probe=false           measure speed and memory by some steps in a process of their own; the figures are kept for this model,
                        these versions and this machine, for later plans and for `lamina client`; `again` measures anew
  --what-if KIND:MEMORY the plan of another machine: cuda:24GiB, cuda7.5:16GiB, cpu:4GiB,cores=8

examples:
  lamina plan
  lamina plan model=./my-model rank=32 batch_size=16 max_length=1024
  lamina plan model=./llama-70b --what-if cuda:80GiB --json"""

_KNOWN = {
    "model": "tiny", "rank": "8", "batch_size": "8", "max_length": "128", "local_steps": "20", "deadline_s": "",
    "memory": "", "formats": "", "download_rank": "0", "compensation": "0", "device": "auto", "probe": "false",
}  # fmt: skip


def main(command: str, words: Sequence[str]) -> int:
    """Run `lamina plan`.

    Args:
        command: `plan`.
        words: What follows it.

    Returns:
        Exit code 0.

    Raises:
        ConfigError: If a setting is unknown, the model has no configuration, or nothing fits.
    """
    if any(word in ("-h", "--help") for word in words):
        print(_HELP)
        return 0
    rest, imagined = _imagined([word for word in words if word != "--json"])
    plain, settings = parsed(rest, _KNOWN)
    if plain:
        raise ConfigError(f"lamina {command}: expected key=value, got {plain[0]!r}. See `lamina {command} --help`.")
    numbers = _numbers(settings)
    other = what_if(imagined) if imagined else None
    from lamina.client.model import quiet
    from lamina.client.sizing.planner import Wanted, plan
    from lamina.client.sizing.probed import probed, remembered
    from lamina.client.sizing.shape import shape_of
    from lamina.client.sizing.written import document

    quiet()
    shape = shape_of(settings["model"])
    if shape.positions and numbers["max_length"] > shape.positions:
        raise ConfigError(
            f"max_length={numbers['max_length']}: expected at most {shape.positions}, what the positions of "
            f"model={settings['model']} reach."
        )
    machine = other or profile(settings["device"])
    wanted = of_source(Wanted(**numbers), settings["model"], shape, machine)
    if not imagined:
        machine = remembered(machine, settings["model"])
    if settings["probe"] == "again" or flag(settings, "probe"):
        if imagined:
            raise ConfigError("probe=true: expected this machine, got --what-if. Leave one of them out.")
        if settings["probe"] == "again" or not machine.speeds:
            machine = probed(machine, settings["model"], wanted, lambda text: print(text, file=sys.stderr))
    found = plan(machine, shape, wanted)
    if "--json" in words:
        print(
            json.dumps({"profile": asdict(machine), "parameters": shape.parameters, "plan": document(found)}, indent=1)
        )
    else:
        _show(machine, settings["model"], shape.parameters, found)
    return 0


def of_source(wanted: Wanted, source: str, shape: Shape, machine: Profile) -> Wanted:
    """What is wanted, with what the model's files are.

    Args:
        wanted: Without.
        source: The model.
        shape: Of it.
        machine: For which copies compute in its own format.

    Returns:
        With the bytes and the format of a full-precision file, or the formats of a quantised copy.

    Raises:
        ConfigError: If a copy's manifest cannot be read.
    """
    from lamina.client.quantised import formats
    from lamina.client.sizing.shape import held_as

    held = held_as(source, shape)
    if not held.copy:
        return replace(wanted, file_bytes=held.file_bytes, file_format=held.format)
    return replace(
        wanted,
        only=(held.format, formats.compute_of(held.compute, held.format, machine)),
        module_formats=held.modules,
        compensation=max(wanted.compensation, held.compensation),
    )


def _imagined(words: Sequence[str]) -> tuple[list[str], str]:
    """The words without `--what-if` and what followed it."""
    rest = list(words)
    for index, word in enumerate(rest):
        if word.startswith("--what-if="):
            return rest[:index] + rest[index + 1 :], word.partition("=")[2]
        if word == "--what-if":
            if index + 1 == len(rest):
                raise ConfigError("--what-if: expected KIND:MEMORY after it, such as cuda:24GiB.")
            return rest[:index] + rest[index + 2 :], rest[index + 1]
    return rest, ""


def _numbers(settings: dict[str, str]) -> dict[str, Any]:
    """What is wanted, by the names of `Wanted`."""

    def whole(key: str, least: int) -> int:
        if not settings[key].isdecimal() or len(settings[key]) > 9 or int(settings[key]) < least:
            raise ConfigError(f"{key}={settings[key]}: expected a whole number of at least {least}.")
        return int(settings[key])

    deadline = settings["deadline_s"]
    try:
        seconds = float(deadline) if deadline else None
    except ValueError:
        seconds = -1.0
    if seconds is not None and not 0 < seconds < 1e9:
        raise ConfigError(f"deadline_s={deadline[:40]}: expected seconds above 0.")
    return {
        "rank": whole("rank", 1),
        "batch_size": whole("batch_size", 1),
        "max_length": whole("max_length", 2),
        "local_steps": whole("local_steps", 1),
        "deadline_s": seconds,
        "formats": tuple(one for one in settings["formats"].split(",") if one),
        "memory_bytes": num_bytes(settings["memory"], "memory") if settings["memory"] else None,
        "download_rank": whole("download_rank", 0),
        "compensation": whole("compensation", 0),
    }


def _show(machine: Profile, source: str, parameters: int, found: Plan) -> None:
    from rich.console import Console
    from rich.table import Table

    from lamina.client.sizing.planner import trained

    console = Console()
    capability = "" if machine.capability is None else f", capability {machine.capability[0]}.{machine.capability[1]}"
    memory = f"{size(machine.free_bytes)} free of {size(machine.total_bytes)}"
    print(f"device   {machine.kind}: {machine.name}{capability}; {memory}, {machine.cores} cores")
    print(f"model    {source}: {parameters:,} parameters")
    batch = f"{found.micro_batch} x {found.accumulation} examples of {found.max_length} tokens"
    print(f"plan     {found.format} base, {trained(found)}, {batch}")
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("memory")
    table.add_column("", justify="right")
    rows: list[tuple[str, Any]] = [(name, value) for name, value in found.terms.items() if value]
    for name, value in [*rows, ("with a tenth to spare", found.peak_bytes), ("there is", found.budget_bytes)]:
        table.add_row(name, size(value))
    console.print(table)
    for reason in found.reasons:
        print(f"- {reason}")
