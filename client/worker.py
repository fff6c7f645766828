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
from lamina.client import resident
from lamina.client.data import Example
from lamina.client.evaluate import score
from lamina.client.hardware import host_memory, profile, size
from lamina.client.loading import BaseOptions, check_length, load_base, load_tokenizer, resolved
from lamina.client.model import Base, put
from lamina.client.own import OwnExamples, own_examples
from lamina.client.participant import ClientState, Site, received, respond, update_format
from lamina.client.policy import Policy
from lamina.client.private.deployed import private
from lamina.client.quantised import copies, selftest
from lamina.client.sizing.fitting import (
    Offer,
    applied,
    coarse,
    fitted,
    known_plan,
    line,
    offer_of,
    tightened,
    to_keep,
    wanted_of,
)
from lamina.client.sizing.importance import check_public, chosen_ranks
from lamina.client.sizing.planner import SHARE, Plan, Wanted
from lamina.client.sizing.probed import remembered
from lamina.client.work import Allow, Sized, Trained
from lamina.protos import compose
from lamina.protos.adapter import Adapter
from lamina.protos.allocator import give_back
from lamina.protos.config import Config, check_micro_batch
from lamina.protos.errors import AdapterMismatch, CheckpointError, DataError, PolicyRefused
from lamina.protos.messages import Instruction, Update, Wish
from lamina.protos.ranks import uniform
from lamina.protos.spec import AdapterSpec
from lamina.protos.statements import budget_of

# How torch says that the processor's memory is at an end, where it raises no MemoryError.
_NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


@dataclass
class _Run:
    config: Config
    site: Site
    held_out: Sequence[Example]


@dataclass(frozen=True)
class _Fit:
    """A plan, what it was made for, and what was held besides when it was made."""

    run_id: str
    wanted: Wanted
    plan: Plan
    held: int


class SiteWorker:
    """Trains with torch.

    Args:
        config: The site's own: data, model, device, threads.
        policy: What may leave.
        say: Told what is going on.
    """

    def __init__(self, config: Config, policy: Policy, say: Callable[[str], None]) -> None:
        self._config, self._policy, self._say = config, policy, say
        self._imports = resident.now()
        self._fit: _Fit | None = None
        self._data: tuple[tuple[Any, ...], OwnExamples] | None = None
        self._base: Base | None = None
        self._loaded: tuple[Any, ...] = ()
        self._run: _Run | None = None
        self._tested = False
        self._state = ClientState()
        self._shared: dict[str, frozen_part.Frozen] = {}

    def size(self, terms: Mapping[str, Any], spec: AdapterSpec, kept: Mapping[str, Any] | None) -> Sized:
        """What the site can hold of what it is offered.

        Args:
            terms: Checked by the site's policy.
            spec: The run's schema.
            kept: What an earlier `size` of this run gave to keep, or None. It stays as long as it fits.

        Returns:
            What to register for, and what to keep.

        Raises:
            NothingFits: If no way to train fits.
            ConfigError: If the site's model or settings are impossible.
        """
        config = compose.with_values(self._config, terms["task"])
        check_micro_batch(config)
        self._check_copy(config.model.source)
        self._examples(config, spec)
        machine = remembered(profile(config.train.device), config.model.source)
        offer = offer_of(terms)
        held = max(0, resident.now() - self._imports) if machine.kind == "cpu" else 0
        wanted = wanted_of(config, offer, spec, machine, held)
        leaves = f"{self._policy.leave.rank} {self._policy.leave.allocation}"
        known = known_plan(kept, wanted, machine, leaves)
        if known is not None:
            chosen, ranks = known
        else:
            chosen = fitted(config, spec, wanted, machine)
            ranks = self._ranks(applied(config, chosen), chosen, offer, spec, str(terms["client_id"]))
        self._fit = _Fit(str(terms["run_id"]), wanted, chosen, held)
        self._say(line(chosen))
        told = chosen.format if self._policy.leave.format == "exact" else ""
        same = ranks == uniform(spec, offer.rank, config.lora.rank_pattern)
        return Sized(Wish(None, None if same else ranks, told), to_keep(wanted, chosen, ranks, leaves))

    def _ranks(self, config: Config, chosen: Plan, offer: Offer, spec: AdapterSpec, client_id: str) -> dict[str, int]:
        """The ranks that the site trains: the plan's, or where they matter on its data; as coarse as its policy says."""
        offered = uniform(spec, offer.rank, config.lora.rank_pattern)
        ranks = {module: min(rank, offered[module]) for module, rank in chosen.ranks.items() if module in offered}
        if offer.equal_ranks:
            return offered
        if config.lora.allocation == "importance" and self._policy.leave.allocation:
            check_public(config)
            base = self._with_base(config, spec)
            # What the plan leaves out has rank 0 here, too.
            pattern = {**config.lora.rank_pattern, **{module: 0 for module in offered if module not in chosen.ranks}}
            config = replace(config, lora=replace(config.lora, rank_pattern=pattern))
            ranks = chosen_ranks(config, base, self._examples(config, spec).train, chosen.rank, client_id)
        return coarse(ranks) if self._policy.leave.rank == "coarse" else ranks

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
        if self._fit is not None and self._fit.run_id == terms["run_id"]:
            config = applied(config, self._fit.plan)
            if 2 * self._fit.plan.peak_bytes > self._fit.plan.budget_bytes:
                give_back(1)  # left to itself, the C library holds up to twice of what is planned
        if config.threads:
            torch.set_num_threads(config.threads)
        self._with_base(config, spec)
        examples = self._examples(config, spec)
        site = Site(
            client_id=str(terms["client_id"]),
            examples=examples.train,
            budget=budget_of(terms["budget"]),
            train=config.train,
            rounds=int(terms["rounds"]),
            wire=update_format(config),
            seed=config.seed,
            private=private(config, int(terms["rounds"])),
            figures=config.privacy.mode == "none",
        )
        if site.private is not None:
            self._say(f"privacy: {site.private.mechanism.line()}")
        self._run = _Run(config, site, examples.held_out)
        self._state = restored(state, version)
        self._shared = {} if self._state.frozen is None else {self._state.frozen.digest: self._state.frozen}

    def _with_base(self, config: Config, spec: AdapterSpec) -> Base:
        targets = config.lora.target_modules
        quantisation = config.quantisation
        key = (config.task, spec.labels, config.adapter.kind, str(targets), config.seed, str(quantisation))
        if self._base is None or key != self._loaded:
            self._say(f"loading {config.model.source}")
            options = BaseOptions(
                source=config.model.source,
                revision=config.model.revision,
                task=config.task,
                labels=spec.labels,
                kind=config.adapter.kind,
                target_modules=targets,
                seed=config.seed,
                device=config.train.device,
                format=quantisation.format,
                compute=quantisation.compute,
                bits=quantisation.bits,
                compensation=quantisation.compensation,
            )
            self._base = None  # before the next is loaded
            self._check_copy(config.model.source)
            self._base, self._loaded, self._tested = load_base(options), key, False
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
                f"model.source={config.model.source}: expected the modules and whole parameters of the run's schema, got others. "
                "Run `lamina spec` with the same kind, target_modules, task and labels as the coordinator."
            )
        self._base.spec = spec
        check_length(self._base, config.train.max_length)
        return self._base

    def _check_copy(self, source: str) -> None:
        """Raise where the base is a quantised copy whose maker the site does not trust."""
        copy, trusted = copies.read_manifest(resolved(source)), self._policy.manifests
        if copy is not None and trusted and copy.digest not in trusted:
            raise PolicyRefused(
                f"{self._policy.source}: manifests: expected a quantised copy whose manifest is listed, got that of "
                f"model.source={source}, SHA-256 {copy.digest}. Take a copy that is trusted, or list this one."
            )

    def _examples(self, config: Config, spec: AdapterSpec) -> OwnExamples:
        """The site's examples, made once for one length; before there is a base, so that a plan sees what they take."""
        key = (
            config.task,
            spec.labels,
            str(config.data),
            str(config.privacy),
            config.train.max_length,
            config.evaluate.split,
        )
        if self._data is None or self._data[0] != key:
            self._say(f"reading {config.data.source}")
            tokenizer = load_tokenizer(resolved(config.model.source), config.model.revision)
            self._data = (key, own_examples(config, spec.labels, tokenizer))
            found = self._data[1]
            self._say(f"{len(found.train)} training examples, {len(found.held_out)} held out")
        return self._data[1]

    def train(self, instruction: Instruction, progress: Callable[[int], None], allow: Allow) -> Trained:
        """Train from a release.

        Args:
            instruction: With the release's files.
            progress: Told each step; may raise.
            allow: Asked for leave before anything is trained under example-dp.

        Returns:
            The encoded update and the state after it.

        Raises:
            LaminaError: See `participant.respond`.
        """
        run, base = self._begun()
        self._look_again(run)
        private = run.site.private
        event = None if private is None else private.mechanism.event(run.site.client_id, instruction.round)
        spent = None if event is None else allow(event)

        took = 0

        def leaving(update: Update) -> Update:
            nonlocal took
            took = self._tell_peak(update, base)
            metrics, num_examples = policies.leaving(self._policy, update.metrics, update.num_examples)
            told = update.privacy if spent is None else {**(update.privacy or {}), "epsilon": spent}
            return replace(update, metrics=metrics, num_examples=num_examples, privacy=told)

        try:
            reply, after = respond(
                run.site, base, self._state, instruction, self._shared, lambda step, loss: progress(step), leaving
            )
        except (MemoryError, RuntimeError) as error:
            if not isinstance(error, MemoryError) and not any(word in str(error).lower() for word in _NO_MEMORY):
                raise
            put(base, Adapter(), None, trainable=False)
            if self._fit is not None:
                self._tighten(run, int(0.8 * self._fit.plan.peak_bytes))
            raise MemoryError("expected room for a training step, got none") from None
        if self._fit is not None and took > (room := self._fit.held + self._fit.plan.budget_bytes):
            self._tighten(run, int(self._fit.plan.peak_bytes * room / took))
        if reply.update is None:
            raise AdapterMismatch("expected an update, got none.")
        self._state = after
        self._shared = {} if after.frozen is None else {after.frozen.digest: after.frozen}
        return Trained(reply.update.read(), saved(after), event)

    def _look_again(self, run: _Run) -> None:
        """A smaller plan where less is free by now than when it was made."""
        if self._fit is None or self._begun()[1].device.type != "cpu" or not resident.now():
            return
        held = max(0, resident.now() - self._imports - self._fit.held)
        room = held + int(SHARE * host_memory()[1])
        if room < self._fit.plan.peak_bytes:
            self._tighten(run, room)

    def _tighten(self, run: _Run, room: int) -> None:
        """Plan anew within less memory: the ranks, the format and the examples stay as they are."""
        assert self._fit is not None
        chosen = tightened(run.config, self._begun()[1].spec, self._fit.wanted, self._fit.plan, room)
        if chosen is None:
            self._say(f"less memory is free than was planned with, {size(room)}, and nothing smaller fits")
            return
        self._fit = replace(self._fit, plan=chosen)
        run.config = applied(run.config, chosen)
        run.site = replace(run.site, train=run.config.train)
        self._say(f"less memory is free than was planned with; {line(chosen)}")

    def _tell_peak(self, update: Update, base: Base) -> int:
        """Say what training took, beside what was planned; bytes, 0 where nothing says it."""
        peak = int(update.metrics.get("peak_bytes", 0))
        if peak and self._fit is not None:
            took = peak if base.device.type == "cuda" else peak - self._imports
            planned = self._fit.held + sum(self._fit.plan.terms.values())
            self._say(f"round {update.round}: peak memory {size(took)}, predicted {size(planned)}")
            return took
        return 0

    def measure(self, instruction: Instruction) -> dict[str, float]:
        """Score held-out text with a release as this client has it; the client's state stays as it is.

        Args:
            instruction: With the release's files.

        Returns:
            Sums `nats`, `targets`, `hits`.
        """
        run, base = self._begun()
        if run.config.privacy.mode != "none":
            mode = f"privacy.mode={run.config.privacy.mode}"
            raise PolicyRefused(
                f"evaluation: expected none under {mode}: no noise would cover the figures of this site's text."
            )
        if not run.held_out:
            raise DataError(f"data.source={run.config.data.source}: expected rows to hold out, got too few.")
        release, beside = received(run.site, base, self._state, instruction, dict(self._shared))
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
