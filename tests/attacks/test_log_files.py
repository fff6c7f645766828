"""Attack: the log is as it was signed, and a file that it speaks of is not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from lamina.protos.errors import IdentityError
from lamina.server.commands.log import main
from tests import deployment
from tests.hostile import end
from tests.logs import Event, unsigned, written

ADAPTER = "adapter/adapter_model.safetensors"


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run with certificates that has finished."""
    folder = tmp_path_factory.mktemp("ended")
    who = deployment.certificates(folder / "pki")
    (folder / "spec.json").write_text(deployment.spec().to_json())
    words = deployment.words(folder / "spec.json", f"coordinator.identity={who['coordinator']}")
    with deployment.coordinator(folder / "run", words) as running:
        for name in deployment.NAMES:
            deployment.in_thread(deployment.agent(name, running.port, folder / name, who[name]))
        assert running.join() == 0
    return folder / "run"


@pytest.fixture
def run_dir(ended: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(ended, tmp_path / "run"))


def spec_of(run_dir: Path) -> Path:
    wanted = json.loads((run_dir / "events.jsonl").read_text().splitlines()[0])["fields"]["spec"]
    return run_dir / f"blobs/{wanted[:2]}/{wanted}"


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def edited(path: Path, change: Callable[[list[dict[str, object]]], list[dict[str, object]]]) -> None:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(line) + "\n" for line in change(lines)))


def refused(run_dir: Path, *words: str) -> str:
    with pytest.raises(IdentityError) as caught:
        main("log", ["verify", str(run_dir), *words])
    assert caught.value.exit_code == 5
    return str(caught.value)


def test_what_was_compared_is_said(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main("log", ["verify", str(run_dir)]) == 0
    told = capsys.readouterr().out
    assert "config.yaml: same: its SHA-256 is that of the record `begin`" in told
    assert f"{spec_of(run_dir).relative_to(run_dir)}: same" in told
    assert "rounds.jsonl: same: the clients of 3 rounds are those of the records `aggregate`\n" in told
    assert f"{ADAPTER}: same: its SHA-256 is that of the record `end`" in told
    # What is not there need not be, where the log does not say that the run's end wrote it.
    spec_of(run_dir).unlink()
    (run_dir / "config.yaml").unlink()
    assert main("log", ["verify", str(run_dir), "--json"]) == 0
    states = {one["name"]: one["state"] for one in json.loads(capsys.readouterr().out)["files"]}
    assert states == {
        "config.yaml": "absent",
        str(spec_of(run_dir).relative_to(run_dir)): "absent",
        "rounds.jsonl": "same",
        ADAPTER: "same",
    }


def test_a_file_that_is_not_what_was_signed_is_named(run_dir: Path, ended: Path) -> None:
    for name in ("config.yaml", str(spec_of(run_dir).relative_to(run_dir)), ADAPTER):
        flipped(run_dir / name)
        assert refused(run_dir).startswith(f"{run_dir / name}: expected the SHA-256"), name
        shutil.copy(ended / name, run_dir / name)
    for name in (ADAPTER, "rounds.jsonl"):
        (run_dir / name).unlink()
        assert refused(run_dir).startswith(f"{run_dir / name}: expected"), name
        shutil.copy(ended / name, run_dir / name)
    assert main("log", ["verify", str(run_dir)]) == 0


def test_rounds_that_were_edited(run_dir: Path, ended: Path) -> None:
    path = run_dir / "rounds.jsonl"

    def after(change: Callable[[list[dict[str, object]]], list[dict[str, object]]]) -> str:
        shutil.copy(ended / "rounds.jsonl", path)
        edited(path, change)
        return refused(run_dir)

    assert 'round 2: expected the clients ["north","south","west"]' in after(
        lambda lines: [lines[0], lines[1] | {"clients": ["north"]}, lines[2]]
    )
    assert "expected round 3 in both, got it in the log" in after(lambda lines: lines[:2])
    assert "expected round 4 in both, got it in the file" in after(lambda lines: [*lines, lines[2] | {"round": 4}])
    assert "expected one line a round" in after(lambda lines: [lines[0], *lines])
    assert "expected an object with `round`" in after(lambda lines: [{"loss": 1.0}, *lines])
    assert "expected the SHA-256" in after(lambda lines: [lines[0] | {"loss": 0.1}, *lines[1:]])


def test_a_run_that_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The file may be a round behind the log or ahead of it; no adapter is expected, also not after a restart."""
    rounds: list[Event] = [("aggregate", {"round": number, "clients": ["north"]}) for number in (1, 2, 3)]
    begin: Event = ("begin", {"run_id": "r", "certificate": ""})
    events = [begin, *rounds, ("end", {"adapter": "0" * 64}), ("restart", {"run_id": "r"})]
    (tmp_path / "events.jsonl").write_text("".join(written(events, unsigned)[0]))

    def lines(*numbers: int, client: str = "north") -> None:
        text = "".join(json.dumps({"round": number, "clients": [client]}) + "\n" for number in numbers)
        (tmp_path / "rounds.jsonl").write_text(text)

    for numbers, told in {(1, 2): "; 1 later", (1, 2, 3, 4): "; 1 later", (1, 2, 3): "", (): "; 3 later"}.items():
        lines(*numbers)
        assert main("log", ["verify", str(tmp_path)]) == 0
        assert f"the records `aggregate`{told}" in capsys.readouterr().out
    lines(1, 3)
    assert "expected round 2 in both" in refused(tmp_path)
    lines(1, 2, 3, client="south")
    assert "round 1: expected the clients" in refused(tmp_path)
    (tmp_path / "rounds.jsonl").unlink()
    assert main("log", ["verify", str(tmp_path)]) == 0
    assert "rounds.jsonl: absent" in capsys.readouterr().out


def test_an_end_that_was_stopped_early_is_whole(tmp_path: Path) -> None:
    (tmp_path / "spec.json").write_text(deployment.spec().to_json())
    with deployment.coordinator(tmp_path / "run", deployment.words(tmp_path / "spec.json", "insecure=true")) as running:
        end(running, None)
    assert main("log", ["verify", str(tmp_path / "run")]) == 0
