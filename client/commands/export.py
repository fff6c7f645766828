"""`lamina export` and `lamina spec`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from lamina.client.export import export_adapter, merge
from lamina.client.loading import BaseOptions, load_base
from lamina.client.model import quiet
from lamina.protos.config import KINDS
from lamina.protos.errors import ConfigError
from lamina.protos.files import write_atomic
from lamina.protos.words import flag, parsed

_EXPORT = """\
usage: lamina export RUN_DIR [output=DIR] [merge=true] [dtype=fp32|bf16|fp16] [model=BASE] [--json]

Writes the run's adapter as a folder that peft loads, with a model card. With merge=true also DIR/merged: the base with the
adapter merged in float32, then cast, and checked to give the same logits to the number format's tolerance.

examples:
  lamina export outputs/demo/recompress output=my-adapter
  lamina export outputs/demo/recompress output=my-adapter merge=true dtype=bf16

output: default RUN_DIR/export"""

_SPEC = """\
usage: lamina spec MODEL [output=spec.json] [task=causal-lm|sequence-classification] [labels=a,b,c]
                   [kind=lora|norm|head] [target_modules=q_proj,v_proj] [revision=COMMIT] [seed=0] [--json]

Writes the schema that a coordinator needs of a model: modules, shapes, labels, first values of what is trained whole, and the
base's hashes. The coordinator never loads the model.

examples:
  lamina spec tiny
  lamina spec ./my-encoder task=sequence-classification labels=spam,ham output=spec.json"""


def main(command: str, words: Sequence[str]) -> int:
    """Run `lamina export` or `lamina spec`.

    Args:
        command: Which.
        words: What follows it.

    Returns:
        Exit code 0; errors are raised.
    """
    if any(word in ("-h", "--help") for word in words):
        print(_EXPORT if command == "export" else _SPEC)
        return 0
    quiet()
    as_json = "--json" in words
    rest = [word for word in words if word != "--json"]
    return _export(rest, as_json) if command == "export" else _spec(rest, as_json)


def _export(words: Sequence[str], as_json: bool) -> int:
    plain, settings = parsed(words, {"output": "", "merge": "false", "dtype": "fp32", "model": ""})
    if len(plain) != 1:
        raise ConfigError(f"lamina export: expected one run directory, got {len(plain)}. See `lamina export --help`.")
    run_dir = Path(plain[0])
    output = Path(settings["output"] or run_dir / "export")
    merging = flag(settings, "merge")
    negotiated = export_adapter(run_dir, output)
    done: dict[str, object] = {"adapter": str(output)}
    if merging:
        merged = merge(run_dir, output / "merged", negotiated, settings["dtype"], settings["model"])
        done |= {"merged": str(merged.path), "logits_relative_distance": merged.distance, "tolerance": merged.tolerance}
    print(json.dumps(done, indent=1) if as_json else "\n".join(f"{key}: {value}" for key, value in done.items()))
    return 0


def _spec(words: Sequence[str], as_json: bool) -> int:
    known = {
        "output": "spec.json",
        "task": "causal-lm",
        "labels": "",
        "kind": "lora",
        "target_modules": "all-linear",
        "revision": "",
        "seed": "0",
    }
    plain, settings = parsed(words, known)
    if len(plain) != 1:
        raise ConfigError(f"lamina spec: expected one model, got {len(plain)}. See `lamina spec --help`.")
    if settings["task"] not in ("causal-lm", "sequence-classification"):
        raise ConfigError(f"task={settings['task']}: expected causal-lm or sequence-classification.")
    labels = tuple(label for label in settings["labels"].split(",") if label)
    if (settings["task"] == "sequence-classification") != (len(labels) >= 2):
        raise ConfigError(
            "labels: expected an ordered list of two or more for sequence-classification, and none otherwise."
        )
    if settings["kind"] not in KINDS:
        raise ConfigError(f"kind={settings['kind']}: expected one of {', '.join(KINDS)}, as adapter.kind.")
    if not settings["seed"].isdigit():
        raise ConfigError(f"seed={settings['seed']}: expected a whole number.")
    options = BaseOptions(
        source=plain[0],
        revision=settings["revision"],
        task=settings["task"],
        labels=labels,
        kind=settings["kind"],
        target_modules=settings["target_modules"].split(","),
        seed=int(settings["seed"]),
        device="cpu",
    )
    spec = load_base(options).spec
    write_atomic(Path(settings["output"]), spec.to_json())
    summary = {
        "output": settings["output"],
        "modules": len(spec.modules),
        "dense": sorted(spec.dense),
        "hashes": dict(spec.hashes),
    }
    trained = f"{len(spec.modules)} modules, {len(spec.dense)} parameters trained whole"
    told = f"{settings['output']}: {trained}; SHA-256 of the weights {spec.hashes.get('weights')}"
    print(json.dumps(summary, indent=1) if as_json else told)
    return 0
