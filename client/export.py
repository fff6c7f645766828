"""A finished run's adapter for use elsewhere: the peft folder with its card, and on request a merged model.

Merging happens in float32 and is cast once at the end: into a coarser base the small change would be rounded away (at a change
of 1 % of the weights, one merge in bf16 loses about a sixth of it). The merged model is checked against the adapter's logits.
"""

from __future__ import annotations

import json
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from peft import PeftModel

from lamina.client.hashes import hash_weights
from lamina.client.loading import load_tokenizer, resolved
from lamina.protos import seeds, spec
from lamina.protos.errors import AdapterMismatch, ConfigError
from lamina.protos.spec import AdapterSpec

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Largest distance of logits, relative to their norm: a few roundings of the number format through a deep network.
TOLERANCE = {"fp32": 1e-5, "bf16": 5e-2, "fp16": 1e-2}


@dataclass(frozen=True)
class Merged:
    """What a merge did.

    Attributes:
        path: Where the model lies.
        distance: Of its logits from base plus adapter, relative.
        tolerance: That it had to meet.
    """

    path: Path
    distance: float
    tolerance: float


def export_adapter(run_dir: Path, output: Path) -> AdapterSpec:
    """Copy the adapter of a run.

    Args:
        run_dir: The run directory.
        output: A new or empty folder.

    Returns:
        The adapter's spec.

    Raises:
        ConfigError: If the run has no adapter, or something is at `output`.
    """
    source = run_dir / "adapter"
    if not (source / "adapter_model.safetensors").is_file():
        raise ConfigError(
            f"{run_dir}: expected a finished run with adapter/, found none. Finish it with resume={run_dir}."
        )
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"output={output}: expected a new or empty folder, found something there. Choose another.")
    shutil.copytree(source, output, dirs_exist_ok=True)
    return spec.read(output / "spec.json")


def load_plain(run_dir: Path, negotiated: AdapterSpec, model: str) -> tuple[torch.nn.Module, str]:
    """The base of a run in float32, checked against the hash in its spec.

    Args:
        run_dir: For the message.
        negotiated: The run's spec.
        model: `model.source` to take in place of the run's, or empty.

    Returns:
        The transformers model in evaluation mode, and where it came from.

    Raises:
        AdapterMismatch: If the weights are another base's.
        ConfigError: If it cannot be loaded.
    """
    source = resolved(model or negotiated.base_model)
    classes = negotiated.task == "sequence-classification"
    auto = transformers.AutoModelForSequenceClassification if classes else transformers.AutoModelForCausalLM
    more = {}
    if classes:
        more = {
            "num_labels": len(negotiated.labels),
            "id2label": dict(enumerate(negotiated.labels)),
            "label2id": {label: index for index, label in enumerate(negotiated.labels)},
            "pad_token_id": load_tokenizer(source).pad_token_id,
        }
    try:
        base, info = auto.from_pretrained(
            source, dtype=torch.float32, use_safetensors=True, output_loading_info=True, **more
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(f"model={source}: expected the run's base model, got: {str(error).splitlines()[0]}") from None
    kept = {name: value for name, value in base.state_dict().items() if name not in info["missing_keys"]}
    if hash_weights(kept) != negotiated.hashes.get("weights"):
        raise AdapterMismatch(
            f"{run_dir}: expected the base with weights {negotiated.hashes.get('weights', '')[:12]}…, {source} has others. "
            "Give the base that the run was trained on with model=."
        )
    return base.eval(), source


def merge(run_dir: Path, output: Path, negotiated: AdapterSpec, dtype: str, model: str = "") -> Merged:
    """Merge the adapter into a float32 copy of its base, check the logits, cast and save.

    Args:
        run_dir: The run directory.
        output: A new folder.
        negotiated: The run's spec.
        dtype: `fp32`, `bf16` or `fp16`.
        model: Where the base lies, if not where the run had it.

    Returns:
        Where it is and how close its logits are.

    Raises:
        ConfigError: If the number format is unknown.
        AdapterMismatch: If the base is another, or the logits differ by more than the format's tolerance.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype}: expected one of {', '.join(DTYPES)}.")
    base, source = load_plain(run_dir, negotiated, model)
    vocabulary = int(base.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
    tokens = torch.from_numpy(seeds.stream(0, "merge-check").integers(2, vocabulary, (2, 24)))
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        adapted = PeftModel.from_pretrained(base, str(run_dir / "adapter")).eval()
        wanted = adapted(input_ids=tokens).logits.double()
        merged = adapted.merge_and_unload().to(DTYPES[dtype])
        got = merged(input_ids=tokens).logits.double()
    distance = float((got - wanted).norm() / wanted.norm())
    if not distance <= TOLERANCE[dtype]:
        raise AdapterMismatch(
            f"{output}: expected merged logits within {TOLERANCE[dtype]:g} of base plus adapter, got {distance:.3g}. "
            "Nothing was written. Use dtype=fp32, or keep the adapter apart."
        )
    merged.save_pretrained(output)
    load_tokenizer(source).save_pretrained(output)
    record = {
        "merged_from": str(run_dir),
        "dtype": dtype,
        "logits_relative_distance": distance,
        "hashes": dict(negotiated.hashes),
    }
    (output / "lamina.json").write_text(json.dumps(record, indent=1) + "\n")
    return Merged(output, distance, TOLERANCE[dtype])
