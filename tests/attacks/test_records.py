"""Attack: an admissible update whose metrics or names would break what the coordinator writes down."""

from __future__ import annotations

import contextlib
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from lamina.protos.adapter import Adapter
from lamina.protos.codec import encode_update
from lamina.protos.errors import CheckpointError, LaminaError
from lamina.protos.files import sha256
from lamina.server.rounds import Loop, run
from lamina.server.store import checkpoint, run_directory
from lamina.server.store.base import Completed
from lamina.server.store.run_directory import RunDirectory
from tests.federation import attacker, campaign, changed, channel, no_evaluation, one_round


def store(path: Path) -> RunDirectory:
    run_directory.create(path, "rounds: 2\n")
    return RunDirectory(path, {}, 2, True, dict, lambda completed: None)


METRICS: dict[str, dict[str, float]] = {
    "not a number": {"train_loss": math.nan},
    "infinite": {"train_loss": math.inf},
    "infinite seconds": {"seconds": math.inf, "train_loss": 1.0},
    "seconds before time": {"seconds": -1e308},
    "an overflowing loss": {"train_loss": 1.7e308},
    "html": {"<script>alert(1)</script>": 1.0},
    "a thousand metrics": {f"m{i}": float(i) for i in range(1000)},
}


@pytest.mark.parametrize("name", list(METRICS))
def test_a_clients_metrics_never_stop_the_run(tmp_path: Path, name: str) -> None:
    one = campaign(rounds=2)
    attacks = {"2": attacker(one, lambda _, update: changed(update, metrics=METRICS[name]))}
    state = run(Loop(one, channel(one, attacks), no_evaluation, store(tmp_path / "run")))
    assert state.round == 2
    assert [record["round"] for record in run_directory.read_records(tmp_path / "run")] == [1, 2]
    assert checkpoint.load_last(tmp_path / "run") is not None


def files_below(path: Path) -> set[str]:
    return {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}


def renamed(completed: Completed, client: str) -> Completed:
    """A round in which client 2 goes by another name."""
    names = {"2": client}
    return replace(
        completed,
        updates=[
            replace(update, client_id=names.get(update.client_id, update.client_id)) for update in completed.updates
        ],
        releases={names.get(one, one): release for one, release in completed.releases.items()},
        weights={names.get(one, one): weight for one, weight in completed.weights.items()},
    )


@pytest.mark.parametrize("client", ["../../../../outside", "/absolute", "sub/folder", "nul\x00byte"])
def test_a_client_named_like_a_path_writes_nothing_outside(tmp_path: Path, client: str) -> None:
    name = f"{tmp_path}/absolute" if client == "/absolute" else client
    run_dir = tmp_path / "a" / "b" / "run"
    with contextlib.suppress(LaminaError):
        run_directory.keep_round(run_dir, renamed(one_round(campaign()), name))
    kept = {f"a/b/run/rounds/0001/{part}" for part in ("updates", "releases")}
    assert all(str(Path(file).parent) in kept for file in files_below(tmp_path) if "global" not in file)


def test_a_module_named_like_a_path_stays_inside_its_file(tmp_path: Path) -> None:
    completed = one_round(campaign())
    factors = completed.state.adapter.lora["block.q_proj"]
    state = replace(completed.state, adapter=Adapter({"../../../outside": factors, "/tmp/outside": factors}))
    before = files_below(tmp_path)
    run_dir = tmp_path / "a" / "b" / "run"
    checkpoint.save(run_dir, checkpoint.Checkpoint(state, {}, {}, {}), 2)
    assert {Path(file).parent.as_posix() for file in files_below(tmp_path) - before} == {
        "a/b/run/checkpoints/round-0001"
    }
    loaded = checkpoint.load_last(run_dir)
    assert loaded is not None
    assert set(loaded.state.adapter.lora) == {"../../../outside", "/tmp/outside"}


@pytest.mark.parametrize("name", ["../../../secret.txt", "/etc/hostname", "optimizer-../../x.safetensors"])
def test_a_checkpoint_that_names_files_elsewhere_is_refused(tmp_path: Path, name: str) -> None:
    completed = one_round(campaign())
    checkpoint.save(tmp_path / "run", checkpoint.Checkpoint(completed.state, {}, {}, {}), 2)
    state = checkpoint.folder(tmp_path / "run", 1) / "state.json"
    document = json.loads(state.read_text().rsplit("\n", 2)[0])
    document["sha256"][name] = "0" * 64
    text = json.dumps(document, indent=1)
    state.write_text(f"{text}\n{sha256(text.encode())}\n")
    with pytest.raises(CheckpointError):
        checkpoint.load_last(tmp_path / "run")


def test_a_rejected_payload_is_not_written_down(tmp_path: Path) -> None:
    one = campaign(rounds=1)
    attacks = {"2": attacker(one, lambda _, update: encode_update(replace(update, num_examples=0), "fp32"))}
    run(Loop(one, channel(one, attacks), no_evaluation, store(tmp_path / "run")))
    kept = files_below(tmp_path / "run" / "rounds")
    assert {name.split("/")[-1] for name in kept if "updates" in name} == {"0.safetensors", "1.safetensors"}
    (record,) = run_directory.read_records(tmp_path / "run")
    assert record["rejections"] == [{"client_id": "2", "reason": "weight"}]
