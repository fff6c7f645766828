"""`lamina audit` as a user has it: a campaign of its own, finished runs, a broken-off audit, bad input, codes, signatures."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import stat
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from lamina.audits import novelty
from lamina.protos.errors import StorageError
from lamina.protos.files import alone
from tests import audits
from tests.consortium import enrolled, new_ca
from tests.e2e.commands import failed, here, lamina, run_words

KEYS = {
    "schema", "lamina", "made_at", "seconds", "quick", "seed", "settings", "subject", "claim", "mechanism", "checks",
    "membership", "exposure", "one_run", "client_canaries", "reconstruction", "close_up", "extraction", "novelty", "defences",
    "verdict", "reasons", "limits", "signature",
}  # fmt: skip
# An audit of the smallest size.
SMALL = ("--quick", "canaries=24", "rows=8", "guesses=8", "examples=8", "shadows=2")


def document(folder: Path) -> dict[str, Any]:
    found = json.loads((folder / "audit.json").read_text())
    assert set(found) == KEYS
    return dict(found)


def campaign(llama: Path, notes: Path, output: Path, *more: str) -> list[str]:
    words = [
        f"model={llama}",
        f"data={notes}",
        *audits.CAMPAIGN,
        "clients.count=3",
        "threads=1",
        *SMALL,
        f"output={output}",
    ]
    found = {word.partition("=")[0]: word for word in [*words, *more]}
    return ["audit", *found.values()]


@pytest.fixture(scope="module")
def leaking(llama: Path, notes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run without privacy whose updates were kept."""
    path = tmp_path_factory.mktemp("audited") / "run"
    ended = lamina(*run_words(llama, notes, path, "keep_updates=true", "strategy=stack"))
    assert ended.code == 0, ended
    return path


@pytest.fixture(scope="module")
def private(llama: Path, notes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished private run that kept no updates."""
    path = tmp_path_factory.mktemp("private") / "run"
    ended = lamina(*run_words(llama, notes, path, *audits.PRIVATE))
    assert ended.code == 0, ended
    return path


def test_without_privacy_every_canary_is_found(tmp_path: Path) -> None:
    """The command of the guide, on the base and text that come with the package."""
    output = tmp_path / "audit"
    parts = "parts=mechanism,canaries,membership,reconstruction"
    ended = lamina("audit", "--quick", "privacy=none", "threads=1", parts, f"output={output}")
    assert ended.code == 0, ended
    assert "\x1b" not in ended.out
    found = document(output)
    assert (found["verdict"], found["claim"], found["mechanism"]) == ("no-claim", None, None)
    assert found["membership"]["auc"] > 0.95
    one_run = found["one_run"]
    assert one_run["right"] == one_run["guesses"] == 80
    assert one_run["epsilon_lower"] == one_run["ceiling"] > 3
    assert one_run["epsilon_lower_fdp"] == one_run["ceiling_fdp"] > 7
    rare = found["exposure"]["canaries"]["rare"]
    assert rare["mean"] > 4 * rare["chance"]
    assert min(one["auc"] for one in found["membership"]["rows"].values()) > 0.7
    # Peers receive a mean; single clients are the coordinator's to read.
    assert found["reconstruction"]["coordinator"]["recall"] > 3 * found["reconstruction"]["coordinator"]["chance"]
    for name in ("audit.json", "audit.html"):
        assert stat.S_IMODE((output / name).stat().st_mode) == 0o600
    assert stat.S_IMODE(output.stat().st_mode) == 0o700  # it has the campaign's updates
    assert "No privacy was claimed" in (output / "audit.html").read_text()
    assert not (output / "parts").exists()


def test_a_right_mechanism_is_never_called_violated(
    llama: Path, notes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = campaign(llama, notes, tmp_path / "audit", *audits.PRIVATE, "fail_on=violated")
    ended = here(capsys, *words)
    assert ended.code == 0, ended
    found = document(tmp_path / "audit")
    assert found["verdict"] == "under-powered"  # eight guesses cannot refute 8
    assert (found["claim"]["unit"], found["claim"]["delta"]) == ("record", 1e-5)
    assert found["claim"]["epsilon"] == pytest.approx(8, abs=0.05)
    assert all(check["holds"] for check in found["checks"])
    assert len(found["checks"]) == 9
    spent = found["mechanism"]["epsilon_by_round"]
    assert spent == sorted(spent)
    assert spent[-1] == pytest.approx(found["mechanism"]["epsilon_recomputed"])


@pytest.mark.parametrize("strategy", ["stack", "ffa"])
def test_the_command_names_what_it_does(
    strategy: str, llama: Path, notes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All parts but the defences, each with its line."""
    ended = here(capsys, *campaign(llama, notes, tmp_path / "audit", f"strategy={strategy}"))
    assert ended.code == 0, ended
    for part in ("campaign", "mechanism", "canaries", "membership", "reconstruction", "extraction", "novelty"):
        assert f"/7] {part}:" in ended.out
    assert f"report: {tmp_path}/audit/audit.html" in ended.out.replace("\n", "")
    found = document(tmp_path / "audit")
    assert found["reconstruction"]["peer"]["individuals"] == (strategy == "stack")
    assert found["reconstruction"]["secagg-coordinator"]["applicable"] == (strategy == "ffa")
    assert found["extraction"]["prompts"] > 0
    assert found["novelty"]["samples"]


def test_a_finished_run_with_kept_updates(leaking: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.read_bytes() for path in leaking.rglob("*") if path.is_file() and "audit" not in path.parts}
    ended = here(capsys, "audit", str(leaking), *SMALL, "parts=membership,reconstruction", "--json")
    assert ended.code == 0, ended
    found = document(leaking / "audit")
    assert json.loads(ended.out) == found
    assert (found["subject"]["origin"], found["membership"]["of"]) == ("kept", "rows")
    assert found["membership"]["members"] == 8
    assert found["one_run"]["canaries"] <= 16
    peer = found["reconstruction"]["peer"]
    assert peer["applicable"]
    assert peer["individuals"]
    assert set(peer["by_client"]) == {"1", "2"}  # of the others; the peer is client 0
    assert found["close_up"]["peer"]["individuals"]
    assert {path: path.read_bytes() for path in before} == before


def test_a_run_without_kept_updates_is_run_again(private: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ended = here(capsys, "audit", str(private), *SMALL, "parts=mechanism,reconstruction")
    assert ended.code == 0, ended
    found = document(private / "audit")
    assert found["subject"]["origin"] == "replayed"
    assert {check["name"] for check in found["checks"]} == {
        "accounting", "noise", "independence", "update", "figures", "noise alone", "sensitivity", "sampling",
    }  # fmt: skip
    assert all(check["holds"] for check in found["checks"])
    assert found["reconstruction"]["coordinator"]["applicable"]
    for name, file in {"config": "config.yaml", "rounds": "rounds.jsonl", "summary": "summary.json"}.items():
        assert found["subject"]["hashes"][name] == hashlib.sha256((private / file).read_bytes()).hexdigest()


def test_a_claim_below_the_truth_is_refuted(private: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whoever writes a smaller epsilon into the summary."""
    run = shutil.copytree(private, tmp_path / "run", ignore=shutil.ignore_patterns("audit"))
    summary = json.loads((run / "summary.json").read_text())
    summary["privacy"]["epsilon"] /= 4
    summary["privacy"]["per_client"] = {client: value / 4 for client, value in summary["privacy"]["per_client"].items()}
    (run / "summary.json").write_text(json.dumps(summary))
    words = ("audit", str(run), *SMALL, "parts=mechanism")
    ended = here(capsys, *words)
    assert (ended.code, document(run / "audit")["verdict"]) == (0, "violated")
    assert "accounting" in ended.out
    assert here(capsys, *words, "fail_on=violated").code == 4


@pytest.mark.parametrize(
    ("file", "old", "new", "says"),
    [
        ("summary.json", '"epsilon": [0-9.]+', '"epsilon": NaN', "no number"),
        ("summary.json", '"epsilon": [0-9.]+', '"epsilon": "8"', "no number"),
        ("summary.json", '"epsilon": [0-9.]+', '"epsilon": -1', "no number"),
        ("summary.json", '"delta": [0-9.e-]+', '"delta": 1', "delta"),
        ("summary.json", '"per_client": {[^{}]*}', '"per_client": []', "per_client"),
        ("rounds.jsonl", '"clients": ?\\["0"', '"clients": ["../../0"', "names of clients"),
        ("rounds.jsonl", '"round": ?1', '"number": 1', "without its number"),
        ("checkpoints/round-*2/state.json", '"sample_rate": ?[0-9.]+', '"sample_rate": 0', "event"),
    ],
)
def test_a_run_that_says_what_no_run_says(
    file: str, old: str, new: str, says: str, private: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A claim that is no number would be refuted by nothing; a client's name becomes a path."""
    run = shutil.copytree(private, tmp_path / "run", ignore=shutil.ignore_patterns("audit"))
    path = next(run.glob(file))
    changed, times = re.subn(old, new, path.read_text())
    assert times
    path.write_text(changed)
    assert says in failed(here(capsys, "audit", str(run), *SMALL, "parts=mechanism"))


def test_an_adapter_that_was_exchanged_is_not_explained_by_the_replay(
    private: Path, leaking: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(private, tmp_path / "run", ignore=shutil.ignore_patterns("audit"))
    shutil.copy(leaking / "adapter" / "adapter_model.safetensors", run / "adapter" / "adapter_model.safetensors")
    ended = here(capsys, "audit", str(run), *SMALL, "parts=reconstruction")
    assert ended.code == 0, ended
    assert "gives another adapter" in ended.out
    assert document(run / "audit")["subject"]["origin"] == "not kept"


def test_an_audit_that_broke_off_goes_on(
    llama: Path, notes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = campaign(llama, notes, tmp_path / "audit", "parts=canaries,membership,novelty")
    explore = novelty.explore

    def broken(*of: Any) -> Any:
        raise StorageError("expected room on the disk, got none")

    monkeypatch.setattr(novelty, "explore", broken)
    failed(here(capsys, *words), 1)
    assert not (tmp_path / "audit" / "audit.json").exists()
    assert stat.S_IMODE((tmp_path / "audit" / "parts").stat().st_mode) == 0o700
    monkeypatch.setattr(novelty, "explore", explore)
    again = here(capsys, *words)
    assert again.code == 0, again
    assert again.out.count("taken from an earlier call") == 2
    assert "rounds 1 to" not in again.out
    whole = here(capsys, *campaign(llama, notes, tmp_path / "whole", "parts=canaries,membership,novelty"))
    assert whole.code == 0, whole
    one, other = document(tmp_path / "audit"), document(tmp_path / "whole")
    assert one | {"made_at": "", "seconds": 0} == other | {"made_at": "", "seconds": 0, "subject": one["subject"]}


def test_other_settings_do_not_take_up_a_campaign(
    llama: Path, notes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = campaign(llama, notes, tmp_path / "audit", "parts=canaries")
    assert here(capsys, *words).code == 0
    assert "Give another output" in failed(here(capsys, *words, "rounds=3"))
    shutil.rmtree(tmp_path / "audit" / "campaign")  # as settings leave it that are refused before anything is trained
    assert here(capsys, *words, "rounds=3").code == 0


def test_other_rows_do_not_take_up_a_campaign(
    llama: Path, notes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_bytes(notes.read_bytes())
    words = campaign(llama, rows, tmp_path / "audit", "parts=canaries")
    assert here(capsys, *words).code == 0
    rows.write_text(notes.read_text().replace("xyzzy", "plugh"))
    assert "Give another output" in failed(here(capsys, *words))


def test_nothing_that_came_with_a_run_is_signed(
    leaking: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A part in a run's own folder may be made up by whoever hands it over."""
    enrolled(new_ca(tmp_path / "ca", now=datetime.now(UTC)), tmp_path / "board", "board", "auditor", datetime.now(UTC))
    run = shutil.copytree(leaking, tmp_path / "run", ignore=shutil.ignore_patterns("audit"))
    (run / "audit" / "parts").mkdir(parents=True)
    words = ("audit", str(run), *SMALL, "parts=extraction", f"identity={tmp_path}/board")
    assert "found parts" in failed(here(capsys, *words))
    assert here(capsys, *words, f"output={tmp_path}/elsewhere").code == 0


def test_a_report_without_text(leaking: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("audit", str(leaking), *SMALL, "parts=reconstruction,extraction,novelty", f"output={tmp_path}/audit")
    assert here(capsys, *words, "show_text=false").code == 0
    found = document(tmp_path / "audit")
    for part in ("reconstruction", "close_up"):
        assert not any(one["examples"] for one in found[part].values())
    assert found["novelty"]["samples"] == []
    assert found["reconstruction"]["peer"]["recall"] is not None


def test_signed_by_an_auditor_and_checked(leaking: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    now = datetime.now(UTC)
    ca = new_ca(tmp_path / "ca", now=now)
    for name, role in (("board", "auditor"), ("north", "client")):
        enrolled(ca, tmp_path / name, name, role, now)
    words = ("audit", str(leaking), *SMALL, "parts=reconstruction", f"output={tmp_path}/audit")
    failed(here(capsys, *words, f"identity={tmp_path}/north"), 5)
    assert not (tmp_path / "audit" / "audit.json").exists()
    assert here(capsys, *words, f"identity={tmp_path}/board").code == 0
    check = ("audit", "verify", f"{tmp_path}/audit", f"ca={tmp_path}/ca/ca.pem")
    ended = here(capsys, *check)
    assert ended.code == 0, ended
    assert "signed by board of hospitals (auditor)" in ended.out
    path = tmp_path / "audit" / "audit.json"
    path.write_text(path.read_text().replace('"no-claim"', '"consistent"'))
    failed(here(capsys, *check), 5)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("parts=memberships",), "membership"),
        (("guesses=500",), "guesses"),
        (("canaries=2",), "at least 8"),
        (("fail_on=leaks",), "violated"),
        (("significance=2",), "significance"),
        (("shadows=3",), "even"),
        (("rows=-1",), "0 for all"),
        (("examples=0",), "at least 8"),
        (("client=north",), "run directory"),
        (("canarys=10",), "canaries"),
        (("--quickly",), "--quick"),
        (("outputs/none-there",), "finished run"),
        (("a", "b"), "at most one"),
        (("verify",), "audit.json"),
        (("identity=nobody",), "nobody"),
        (("show_text=maybe",), "true or false"),
    ],
)
def test_bad_input(words: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    ended = here(capsys, "audit", *words)
    assert says in failed(ended, 5 if "identity" in words[0] else 2)


def test_one_audit_at_a_time_in_a_folder(leaking: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with alone(tmp_path / "audit", "output", "taken"):
        words = ("audit", str(leaking), *SMALL, "parts=extraction", f"output={tmp_path}/audit")
        assert "no other audit" in failed(here(capsys, *words))
    nothing = tmp_path / "nothing"
    nothing.mkdir()
    failed(here(capsys, "audit", str(nothing)))
    assert not list(nothing.iterdir())


def test_a_run_is_audited_as_it_is(
    leaking: Path, notes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "audited as it is" in failed(here(capsys, "audit", str(leaking), "privacy=none"))
    other = tmp_path / "other.jsonl"
    other.write_text(notes.read_text().replace("xyzzy", "plugh"))
    assert "the data of the run" in failed(here(capsys, "audit", str(leaking), f"data={other}"))
    assert str(leaking) in failed(here(capsys, "audit", str(leaking.parent)))
    assert "Leave client= out" in failed(here(capsys, "audit", str(leaking), "client=0"))
    failed(here(capsys, "audit", f"{tmp_path}/mistyped"))
    assert not (tmp_path / "mistyped").exists()
    half = shutil.copytree(leaking, tmp_path / "half")
    (half / "summary.json").unlink()
    assert f"resume={half}" in failed(here(capsys, "audit", str(half)))


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    ended = here(capsys, "audit", "--help")
    assert ended.code == 0
    for word in ("fail_on=", "lamina audit --quick", "privacy.epsilon", "verify"):
        assert word in ended.out
