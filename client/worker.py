"""The worker of a site with a model: loads the base once, trains and measures as the coordinator's terms say, on its own data.

What the coordinator decides comes in the terms; where data and base lie, and on which device to train, is the site's config.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from lamina.client import frozen as frozen_part
from lamina.client import policy as policies
from lamina.client.agent import Trained
from lamina.client.data import Encoder, Example, examples_of
from lamina.client.evaluate import score
from lamina.client.loading import BaseOptions, check_length, load_base
from lamina.client.model import Base, put
from lamina.client.participant import ClientState, Site, received, respond
from lamina.client.policy import Policy
from lamina.client.quantised import selftest
from lamina.client.rows import check_columns, load_rows, text_columns
from lamina.client.split import parts
from lamina.protos import compose
from lamina.protos.adapter import Adapter
from lamina.protos.config import Config
from lamina.protos.errors import AdapterMismatch, CheckpointError, DataError
from lamina.protos.messages import Instruction, Update
from lamina.protos.spec import AdapterSpec
from lamina.protos.statements import budget_of


@dataclass
class _Run:
    config: Config
    site: Site
    held_out: Sequence[Example]


class SiteWorker:
    """Trains with torch.

    Args:
        config: The site's own: data, model, device, threads.
        policy: What may leave.
        say: Told what is going on.
    """

    def __init__(self, config: Config, policy: Policy, say: Callable[[str], None]) -> None:
        self._config, self._policy, self._say = config, policy, say
        self._base: Base | None = None
        self._loaded: tuple[Any, ...] = ()
        self._run: _Run | None = None
        self._tested = False
        self._state = ClientState()
        self._shared: dict[str, frozen_part.Frozen] = {}

    def begin(self, terms: Mapping[str, Any], spec: AdapterSpec, state: Mapping[str, bytes], version: int) -> None:
        """Load base and data, and check them against what the run is about.

        Args:
            terms: Checked by the site's policy.
            spec: The run's schema.
            state: As `Trained.state`; empty for nothing.
            version: Of the release that the state follows, -1 for none.

        Raises:
            AdapterMismatch: If the site's base is another.
            DataError: If its data cannot be trained on.
            ConfigError: If the terms' settings are impossible.
        """
        config = compose.with_values(self._config, terms["task"])
        if config.threads:
            torch.set_num_threads(config.threads)
        base = self._with_base(config, spec)
        train, held_out = self._examples(config, spec, base)
        site = Site(
            client_id=str(terms["client_id"]),
            examples=train,
            budget=budget_of(terms["budget"]),
            train=config.train,
            rounds=int(terms["rounds"]),
            wire=config.wire.format,  # type: ignore[arg-type]
            seed=config.seed,
        )
        self._run = _Run(config, site, held_out)
        self._state = restored(state, version)
        self._shared = {} if self._state.frozen is None else {self._state.frozen.digest: self._state.frozen}

    def _with_base(self, config: Config, spec: AdapterSpec) -> Base:
        targets = config.lora.target_modules
        quantisation = config.quantisation
        key = (config.task, spec.labels, str(targets), config.seed)
        if self._base is None or key != self._loaded:
            self._say(f"loading {config.model.source}")
            options = BaseOptions(
                source=config.model.source,
                revision=config.model.revision,
                task=config.task,
                labels=spec.labels,
                target_modules=targets,
                seed=config.seed,
                device=config.train.device,
                format=quantisation.format,
                compute=quantisation.compute,
                bits=quantisation.bits,
            )
            self._base, self._loaded = load_base(options), key
        mine = self._base.spec
        for what in dict.fromkeys(("weights", *spec.hashes)):
            wanted = spec.hashes.get(what)
            if wanted is None or mine.hashes.get(what) != wanted:
                raise AdapterMismatch(
                    f"model.source={config.model.source}: expected the {what} with SHA-256 {str(wanted)[:12]}… that the run is "
                    f"about, got {str(mine.hashes.get(what))[:12]}…. Give the base that `lamina spec` was run on."
                )
        if mine.modules != spec.modules or set(mine.dense) != set(spec.dense):
            raise AdapterMismatch(
                f"model.source={config.model.source}: expected the modules of the run's schema, got others. "
                "Run `lamina spec` with the same target_modules, task and labels as the coordinator."
            )
        self._base.spec = spec
        check_length(self._base, config.train.max_length)
        return self._base

    def _examples(self, config: Config, spec: AdapterSpec, base: Base) -> tuple[list[Example], list[Example]]:
        data, columns = config.data, text_columns(config.data, config.task)
        self._say(f"reading {data.source}")
        rows = load_rows(data.source, data)
        check_columns(rows, columns, f"data.source={data.source}")
        train, tune, test = parts(rows, data, config.task)
        held_rows = tune if config.evaluate.split == "tune" else test
        encoder = Encoder(base.tokenizer, data, config.task, spec.labels, config.train.max_length)
        examples = examples_of(encoder, train, data.source, "train")
        if len(train) < config.partition.min_examples:
            raise DataError(
                f"data.source={data.source}: expected at least {config.partition.min_examples} training rows, got {len(train)}."
            )
        held_out = encoder.examples(held_rows)[: config.evaluate.max_examples]
        self._say(f"{len(examples)} training examples, {len(held_out)} held out")
        return examples, held_out

    def train(self, instruction: Instruction, progress: Callable[[int], None]) -> Trained:
        """Train from a release.

        Args:
            instruction: With the release's files.
            progress: Told each step; may raise.

        Returns:
            The encoded update and the state after it.

        Raises:
            LaminaError: See `participant.respond`.
        """
        run, base = self._begun()

        def leaving(update: Update) -> Update:
            metrics, num_examples = policies.leaving(self._policy, update.metrics, update.num_examples)
            return replace(update, metrics=metrics, num_examples=num_examples)

        reply, after = respond(
            run.site, base, self._state, instruction, self._shared, lambda step, loss: progress(step), leaving
        )
        if reply.update is None:
            raise AdapterMismatch("expected an update, got none.")
        self._state = after
        self._shared = {} if after.frozen is None else {after.frozen.digest: after.frozen}
        return Trained(reply.update.read(), saved(after))

    def measure(self, instruction: Instruction) -> dict[str, float]:
        """Score held-out text with a release as this client has it; the client's state stays as it is.

        Args:
            instruction: With the release's files.

        Returns:
            Sums `nats`, `targets`, `hits`.
        """
        run, base = self._begun()
        if not run.held_out:
            raise DataError(f"data.source={run.config.data.source}: expected rows to hold out, got too few.")
        release, beside = received(base, self._state, instruction, dict(self._shared))
        put(base, release, beside, trainable=False)
        found = score(base, run.held_out, run.config.evaluate.batch_size)
        put(base, Adapter(), None, trainable=False)
        if not self._tested:
            selftest.check(base, "after the first evaluation")
            self._tested = True
        return {"nats": found.nats, "targets": float(found.targets), "hits": float(found.hits)}

    def _begun(self) -> tuple[_Run, Base]:
        if self._run is None or self._base is None:
            raise AdapterMismatch("expected terms before an instruction.")
        return self._run, self._base


def saved(state: ClientState) -> dict[str, bytes]:
    """A client's state as files.

    Args:
        state: The state.

    Returns:
        Name -> content.
    """
    files = {"state.json": json.dumps({"frozen": state.frozen and state.frozen.digest}).encode()}
    if state.frozen is not None:
        files["frozen.safetensors"] = bytes(save_tensors(frozen_part.to_files(state.frozen)))
    if state.optimizer:
        files["optimizer.safetensors"] = bytes(
            save_tensors({name: tensor.detach().cpu().numpy() for name, tensor in state.optimizer.items()})
        )
    return files


def restored(files: Mapping[str, bytes], version: int) -> ClientState:
    """The inverse of `saved`.

    Args:
        files: Name -> content; empty for a client that carries nothing.
        version: Of the release that it holds.

    Returns:
        The state.

    Raises:
        CheckpointError: If a file is not what `saved` wrote.
    """
    if not files:
        return ClientState()
    try:
        digest = json.loads(files["state.json"])["frozen"]
        frozen = None if digest is None else frozen_part.from_files(load_tensors(files["frozen.safetensors"]), digest)
        tensors = load_tensors(files["optimizer.safetensors"]) if "optimizer.safetensors" in files else {}
        optimizer = {name: torch.from_numpy(value) for name, value in tensors.items()}
        return ClientState(version, frozen, optimizer)
    except (KeyError, ValueError, TypeError) as error:
        raise CheckpointError(f"the client's state: expected the files of the last update, got {error!r}.") from None
