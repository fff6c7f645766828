"""What an audit looks at: a finished run with its base and data, or a campaign of the audit's own with canaries in the data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lamina import __version__
from lamina.audits import canaries as making
from lamina.audits import reading, witness
from lamina.audits.canaries import Canaries
from lamina.audits.reading import Finished
from lamina.audits.settings import Settings
from lamina.audits.witness import Seen, Witness
from lamina.client.data import Example
from lamina.client.loading import BaseOptions, check_length, load_base
from lamina.client.own import own_examples
from lamina.client.private.sampling import units_of
from lamina.client.private.train import Private
from lamina.protos import compose, seeds
from lamina.protos.config import Config, checked, client_names
from lamina.protos.errors import AdapterMismatch, ConfigError
from lamina.protos.files import write_atomic
from lamina.simulations.engine import Quiet, Watcher
from lamina.simulations.prepare import Prepared, prepare
from lamina.simulations.private import mechanisms
from lamina.simulations.run import simulate

# A run that took longer is not run again unasked.
_REPLAY_S, _REPLAY_QUICK_S = 240.0, 30.0
Say = Callable[[str], None]


@dataclass(frozen=True, eq=False)
class Scene:
    """What is audited.

    Attributes:
        run: The finished run; of a replayed one, the replay, which has kept its updates.
        prepared: Base, training examples (of a campaign with the canaries that are in) and held-out examples.
        canaries: Of a campaign, by kind.
        seen: What the optimizers received, where the run was made here.
        private: Client id -> mechanism under example-dp, where the run was made here.
        origin: `campaign`, `kept`, `replayed`, `not kept` (no updates to look at) or `deployment`.
        own_client: In a deployment's run, whose data are here.
    """

    run: Finished
    prepared: Prepared
    canaries: tuple[Canaries, ...] = ()
    seen: tuple[Seen, ...] | None = None
    private: Mapping[str, Private] | None = None
    origin: str = "kept"
    own_client: str = ""

    @property
    def config(self) -> Config:
        """The run's config."""
        return self.run.config

    def real(self) -> dict[str, list[Example]]:
        """Client id -> training examples without the canaries among them."""
        canaries = {id(example.tokens) for some in self.canaries for example in some.examples}
        return {
            client: [example for example in some if id(example.tokens) not in canaries]
            for client, some in self.prepared.train.items()
        }

    def noise_multiplier(self) -> float:
        """That of a run's steps under example-dp; ConfigError where the run says it nowhere."""
        if self.private:
            return next(iter(self.private.values())).mechanism.noise_multiplier
        if not self.run.history:
            raise ConfigError(
                f"{self.run.path}: expected the events of its private mechanism, found none in its checkpoints."
            )
        return float(self.run.history[0]["noise_multiplier"])


def one_a_row(examples: Sequence[Example]) -> list[Example]:
    """The first example of each row.

    Args:
        examples: Any number of each row.

    Returns:
        In the order of the rows.
    """
    first: dict[int, Example] = {}
    for example in examples:
        first.setdefault(example.row, example)
    return list(first.values())


def _keeps_updates(config: Config) -> bool:
    """Whether a run can keep its updates: not where they have no noise yet, nor where nobody has a single one."""
    return config.privacy.mode != "client-dp" and not config.privacy.secagg


def campaign(settings: Settings, config: Config, folder: Path, watcher: Watcher) -> Scene:
    """Run a campaign with canaries, or go on with one.

    Args:
        settings: How many canaries, how many rows.
        config: A checked config; its output is replaced.
        folder: Of the audit.
        watcher: Shown progress.

    Returns:
        What to audit.

    Raises:
        LaminaError: See `simulations.run.simulate`.
    """
    evaluate = config.evaluate
    prepared = prepare(replace(config, evaluate=replace(evaluate, max_examples=None)), watcher.say)
    clients, seed, longest = client_names(config), config.seed, config.train.max_length
    train = {client: _some(prepared.train[client], settings.rows, seed, client) for client in clients}
    most = min(settings.canaries // making.NEW_TOKEN_SHARE, prepared.base.vocab // 2)
    found = (
        making.rare(prepared.base, settings.canaries, clients, longest, seed),
        making.new_token(prepared.base, train, most, longest, seed),
    )
    config = _declared(config, train, found)
    config = checked(replace(config, keep_updates=_keeps_updates(config), checkpoints=max(2, config.checkpoints)))
    prepared = replace(prepared, train=making.inserted(train, found))
    few = {client: held[: evaluate.max_examples] for client, held in prepared.held_out.items()}
    run, seen = _simulated(config, replace(prepared, held_out=few), folder / "campaign", settings, watcher)
    private = mechanisms(config, prepared.train, lambda text: None)
    return Scene(run, prepared, found, seen, private, "campaign")


def close_up(found: Scene, folder: Path) -> Scene:
    """A run's settings in rounds of few steps over few rows, in which most can be read off an update.

    Noise is that of the run, not less for the fewer steps.

    Args:
        found: A campaign, or a finished simulation.
        folder: Of the audit.

    Returns:
        A run of the same clients without canaries.

    Raises:
        ConfigError: If the run says nowhere what its noise was.
    """
    config = found.config
    # Without masks, which hide nothing from whoever holds the sum, and without the coordinator's own noise, which it adds to what
    # it has seen; what each party sees is decided by the views.
    privacy = replace(config.privacy, secagg=False)
    if privacy.mode == "client-dp":
        privacy = replace(privacy, mode="none", epsilon=None, noise_multiplier=None, force=False)
    elif privacy.mode == "example-dp":
        privacy = replace(privacy, noise_multiplier=found.noise_multiplier(), epsilon=None)
    small = replace(
        config,
        rounds=_CLOSE_ROUNDS,
        clients=replace(config.clients, join_round=1, fraction=1.0, dropout_rate=0.0),
        data=replace(config.data, generate=0),
        baselines=[],
        train=replace(
            config.train,
            local_steps=_CLOSE_STEPS,
            batch_size=max(1, config.train.batch_size // _USUAL_BATCH),
            accumulation=1,
            micro_batch=None,
        ),
        evaluate=replace(config.evaluate, every=_CLOSE_ROUNDS, max_examples=1),
        privacy=privacy,
        keep_updates=True,
    )
    few = {client: held[:1] for client, held in found.prepared.held_out.items()}
    prepared = replace(found.prepared, train=found.real(), held_out=few)
    run, _ = _simulated(checked(small), prepared, folder / "close-up", Settings(canaries=8, guesses=2), Quiet())
    meant = replace(run.config.privacy, secagg=config.privacy.secagg, mode=config.privacy.mode)
    return Scene(replace(run, config=replace(run.config, privacy=meant)), prepared, origin="campaign")


# A row a step, and as many more as the batches are larger than a campaign's usual ones.
_CLOSE_ROUNDS, _CLOSE_STEPS, _USUAL_BATCH = 2, 2, 16


def _some(examples: Sequence[Example], rows: int, seed: int, client: str) -> list[Example]:
    """One example of each of so many rows, drawn without looking at them; all examples of all rows where rows is 0."""
    if not rows:
        return list(examples)
    known = sorted({example.row for example in examples})
    drawn = set(seeds.stream(seed, "audit", "rows", client).permutation(known)[:rows].tolist())
    return [example for example in one_a_row(examples) if example.row in drawn]


def _declared(config: Config, train: Mapping[str, Sequence[Example]], found: Sequence[Canaries]) -> Config:
    """Under example-dp, public numbers of records that count every canary, in or out: the coins must not be read off them."""
    if config.privacy.mode != "example-dp" or config.privacy.nominal_examples is not None:
        return config
    unit = "user" if config.privacy.unit == "user" else "record"
    numbers = [
        len(units_of(train[client], unit)) + making.dealt_to(client, found)  # type: ignore[arg-type]
        for client in client_names(config)
    ]
    return replace(config, privacy=replace(config.privacy, nominal_examples=numbers))


def _simulated(
    config: Config, prepared: Prepared, path: Path, settings: Settings, watcher: Watcher
) -> tuple[Finished, tuple[Seen, ...]]:
    """A run under the eyes of a witness; a finished one of the same settings is taken as it is, a broken-off one goes on."""
    mark, fingerprint = path.with_suffix(".json"), _fingerprint(config, settings, prepared)
    before = json.loads(mark.read_text()).get("fingerprint") if mark.is_file() else None
    if before not in (None, fingerprint) and path.exists():  # settings that were refused left nothing but the mark
        raise ConfigError(
            f"{path}: expected no campaign of other settings, data or version there. Give another output, or remove it."
        )
    notes = path.with_suffix(".seen.npz")
    if not (path / "summary.json").is_file():
        going_on = before is not None and any(path.glob("checkpoints/round-*"))
        write_atomic(mark, json.dumps({"fingerprint": fingerprint}))
        looking = Witness(watcher, list(witness.kept(notes)) if going_on else [])
        wanted = replace(config, output=str(path), resume=str(path) if going_on else "")
        try:
            with looking.watching():
                simulate(wanted, looking, prepared)
        finally:
            witness.keep(notes, looking.seen)
    return reading.read(path, []), witness.kept(notes)


def _fingerprint(config: Config, settings: Settings, prepared: Prepared) -> str:
    """All that decides a run: another version, or a file that has other rows now, is no run to go on with."""
    words = compose.to_yaml(replace(config, output="", resume=""))
    known = [
        words,
        settings.canaries,
        settings.rows,
        __version__,
        dict(prepared.corpus),
        dict(prepared.base.spec.hashes),
    ]
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()


def of_run(settings: Settings, overrides: list[str], folder: Path, watcher: Watcher) -> Scene:
    """A finished run with its base and data; a simulation without kept updates is run again, if that is quick enough.

    Args:
        settings: With the run's directory.
        overrides: Where model and data are now.
        folder: Of the audit.
        watcher: Shown progress.

    Returns:
        What to audit.

    Raises:
        ConfigError: If it is no finished run, or its data are others now.
        AdapterMismatch: If its base is another.
    """
    if settings.run_dir is None:
        raise ConfigError("expected a run directory, got none.")
    run = reading.read(settings.run_dir, overrides)
    if run.deployed:
        return _of_deployment(settings, run, watcher.say)
    if settings.client:
        raise ConfigError(
            f"client={settings.client}: {run.path} is a simulation's run, which is audited with the rows of all its clients. "
            "Leave client= out."
        )
    # All held-out rows, not only so many as the run measured on.
    everything = replace(run.config, evaluate=replace(run.config.evaluate, max_examples=None))
    prepared = prepare(everything, watcher.say)
    _check_same(run, prepared)
    if run.kept:
        return Scene(run, prepared)
    took = float(run.summary["seconds"]["train"])
    if not _keeps_updates(run.config):
        watcher.say("updates: none are kept under this privacy mode; what was released is looked at")
    elif took > (_REPLAY_QUICK_S if settings.quick else _REPLAY_S):
        watcher.say(
            f"updates: not kept, and the run trained for {took:.0f} s: not run again. keep_updates=true keeps them"
        )
        return Scene(run, prepared, origin="not kept")
    watcher.say("the run is run again from its seed, to see every step and keep every update")
    return _replayed(run, prepared, folder, settings, watcher)


def _replayed(run: Finished, prepared: Prepared, folder: Path, settings: Settings, watcher: Watcher) -> Scene:
    config, kept = run.config, _keeps_updates(run.config)
    evaluate = replace(config.evaluate, every=config.rounds, max_examples=8)
    again = replace(
        config, keep_updates=kept, evaluate=evaluate, data=replace(config.data, generate=0), baselines=[], resume=""
    )
    few = {client: held[:8] for client, held in prepared.held_out.items()}
    made, seen = _simulated(checked(again), replace(prepared, held_out=few), folder / "replay", settings, watcher)
    if made.hashes()["adapter"] != run.hashes()["adapter"]:
        watcher.say(
            "the run that was run again gives another adapter: another machine or library, or a run that was interfered with. "
            "Its updates are not looked at"
        )
        return Scene(run, prepared, origin="not kept")
    private = mechanisms(config, prepared.train, lambda text: None)
    finished = replace(
        made, config=replace(config, keep_updates=kept), summary=run.summary, rounds=run.rounds, repeats=run.path
    )
    return Scene(finished, prepared, seen=seen, private=private, origin="replayed")


def _check_same(run: Finished, prepared: Prepared) -> None:
    wanted, got = run.spec.hashes.get("weights"), prepared.base.spec.hashes.get("weights")
    if wanted != got:
        raise AdapterMismatch(
            f"{run.path}: expected the base with weights {str(wanted)[:12]}…, model.source={run.config.model.source} has "
            f"{str(got)[:12]}…. Give the run's base with model=."
        )
    corpus = (run.summary.get("corpus") or {}).get("hash")
    if corpus is not None and corpus != prepared.corpus["hash"]:
        raise ConfigError(
            f"{run.path}: expected the data of the run, data.source={run.config.data.source} has others now. Give the run's "
            "data with data=; of `stdlib` the Python version decides."
        )


def _of_deployment(settings: Settings, run: Finished, say: Say) -> Scene:
    """A coordinator's directory, and one site's base and data, which only that site has."""
    client = settings.client
    if not client or client not in {one for record in run.rounds for one in record["clients"]}:
        known = sorted({one for record in run.rounds for one in record["clients"]})
        raise ConfigError(
            f"{run.path} is a deployment's: expected client=NAME, one of {', '.join(known[:8])}, whose rows are in data=, and "
            f"model=, got client={client or 'nothing'}. What the others' rows are nobody here knows."
        )
    config, schema = run.config, run.spec
    if config.data.source == "stdlib":
        raise ConfigError(
            f"{run.path} is a deployment's, which has no data: expected data=FILE, the rows that {client} trained on, got none. "
            "Give them, and model= for the base, as the site's own settings have them."
        )
    say(f"loading {config.model.source}")
    base = load_base(
        BaseOptions(
            source=config.model.source,
            revision=config.model.revision,
            task=schema.task,
            labels=schema.labels,
            kind=config.adapter.kind,
            target_modules=config.lora.target_modules,
            seed=config.seed,
            device=config.train.device,
        )
    )
    check_length(base, config.train.max_length)
    say(f"reading {config.data.source}")
    own = own_examples(config, schema.labels, base.tokenizer)
    _check_rows(run, client, own.held_out)
    corpus = {"source": config.data.source, "hash": "", "rows": len(own.train)}
    prepared = Prepared(
        base, {client: base}, {client: client}, {client: own.train}, {client: own.held_out}, schema.labels, corpus
    )
    _check_same(replace(run, summary={**run.summary, "corpus": None}), prepared)
    base.spec = schema
    return Scene(run, prepared, origin="deployment", own_client=client)


def _check_rows(run: Finished, client: str, held_out: Sequence[Example]) -> None:
    """What a site's rows hold out must be of the size that the site measured on: rows of others would seem to leak nothing."""
    told = ((run.summary.get("eval") or {}).get("per_client") or {}).get(client) or {}
    wanted, got = told.get("tokens"), sum(1 if one.label >= 0 else int(one.targets.sum()) for one in held_out)
    if wanted is not None and wanted != got:
        raise ConfigError(
            f"{run.path}: expected the rows that {client} had, whose held-out part is {wanted:,} targets, "
            f"data.source={run.config.data.source} holds out {got:,}. Give that site's rows with data=, and the data.* settings "
            "that it had."
        )
