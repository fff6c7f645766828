"""The guide for several sites, done as it stands: docs/multi-site.md is read, and each of its blocks is run by its party.

A fence's first word after the language names the party, or several with commas; each has a folder of its own. `background`
leaves a block running. What people do by hand stands in comments of the page:

    carry FROM TO            somebody brings a file or folder to another party
    wait PARTIES EVENT       a block in the background has logged a word
    ended PARTIES            it has ended by itself, with 0
    stop PARTIES             Ctrl-C, after which it ends with 0

Nothing is replaced but host names and ports: both hosts are this machine, and the ports are free ones.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lamina.client.loading import TINY
from tests import deployment, texts
from tests.e2e.commands import ROOT, TIMEOUT_S, data_folder, environment

GUIDE = ROOT / "docs" / "multi-site.md"
SITES = ("north", "south", "west")
# Three of the larger roles, as what the hospitals have; the third speaks least.
ROLES = {"GLOUCESTER": "north", "MENENIUS": "south", "ROMEO": "west"}
_STEP = re.compile(
    r"^<!-- (?P<what>\w+) (?P<words>.*?) -->$|^```(?P<fence>\w+) (?P<who>.+?)\n(?P<text>.*?)^```$", re.M | re.S
)


@dataclass(frozen=True)
class Step:
    """A fence or a comment of the guide, in its place."""

    what: str
    words: tuple[str, ...]
    text: str = ""


def steps(page: str) -> list[Step]:
    found = []
    for match in _STEP.finditer(page):
        if match["fence"]:
            found.append(Step(match["fence"], tuple(match["who"].split()), match["text"]))
        else:
            found.append(Step(match["what"], tuple(match["words"].split())))
    return found


@dataclass
class Walk:
    """The guide under way.

    Attributes:
        root: Holds a folder a party.
        replaced: Host names and ports of the guide to those of this test.
        running: Party to its block in the background.
        said: What each block printed, by its text.
    """

    root: Path
    replaced: Mapping[str, str]
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    said: dict[str, str] = field(default_factory=dict)

    def take(self, step: Step) -> None:
        known: dict[str, Callable[[Step], None]] = {
            "bash": self._bash,
            "yaml": self._write,
            "carry": self._carry,
            "wait": self._wait,
            "ended": self._ended,
            "stop": self._stop,
        }
        known[step.what](step)

    def close(self) -> None:
        for process in self.running.values():
            process.kill()
            process.wait()

    def _here(self, text: str) -> str:
        for name, local in self.replaced.items():
            text = text.replace(name, local)
        return text

    def _folder(self, party: str) -> Path:
        folder = self.root / party
        folder.mkdir(exist_ok=True)
        return folder

    def _bash(self, step: Step) -> None:
        for party in step.words[0].split(","):
            if step.words[1:] == ("background",):
                self._background(party, step.text)
            else:
                self._foreground(party, step.text)

    def _foreground(self, party: str, text: str) -> None:
        command = ["bash", "-euo", "pipefail", "-c", self._here(text)]
        done = subprocess.run(
            command,
            cwd=self._folder(party),
            env=_environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
        self.said[text] = self.said.get(text, "") + done.stdout
        assert done.returncode == 0, f"{party}: {text}\n{done.stdout}\n{self._logs()}"

    def _background(self, party: str, text: str) -> None:
        (command,) = (line for line in text.splitlines() if not line.startswith("#"))
        with self._log(party).open("wb") as log:
            self.running[party] = subprocess.Popen(
                ["bash", "-c", "exec " + self._here(command)],
                cwd=self._folder(party),
                env=_environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def _write(self, step: Step) -> None:
        for party in step.words[0].split(","):
            (self._folder(party) / step.words[1]).write_text(self._here(step.text))

    def _carry(self, step: Step) -> None:
        source, target = (self.root / word for word in step.words)
        self._folder(step.words[1].partition("/")[0])
        target = target / source.name if step.words[1].endswith("/") else target
        if source.is_dir():
            shutil.copytree(source, target)
        else:
            shutil.copy(source, target)

    def _wait(self, step: Step) -> None:
        until = time.monotonic() + 60
        for party in step.words[0].split(","):
            while step.words[1] not in self._log(party).read_text():
                assert self.running[party].poll() is None, self._log(party).read_text()
                assert time.monotonic() < until, self._logs()
                time.sleep(0.05)

    def _ended(self, step: Step) -> None:
        for party in step.words[0].split(","):
            assert self.running.pop(party).wait(60) == 0, self._log(party).read_text()

    def _stop(self, step: Step) -> None:
        for party in step.words[0].split(","):
            self.running[party].send_signal(signal.SIGINT)
        self._ended(step)

    def _log(self, party: str) -> Path:
        return self.root / f"{party}.log"

    def _logs(self) -> str:
        return "\n".join(f"--- {path.name}\n{path.read_text()[-3000:]}" for path in sorted(self.root.glob("*.log")))


def _environment() -> dict[str, str]:
    """This checkout's `lamina` first on the path."""
    return environment() | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


def spoken() -> list[dict[str, Any]]:
    """Speeches of three roles, as notes of three hospitals."""
    with (data_folder() / "shakespeare.jsonl").open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return [{"hospital": ROLES[row["role"]], "text": row["text"]} for row in rows if row["role"] in ROLES]


def made_up() -> list[dict[str, Any]]:
    """Generated notes."""
    return [{"hospital": row["silo"], "text": row["text"]} for row in texts.notes() if row["silo"] in SITES]


@pytest.fixture(scope="module", params=[made_up, spoken], ids=["made-up", "speeches"])
def walked(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Walk]:
    """The whole guide, once for each kind of text."""
    rows = request.param()
    root = tmp_path_factory.mktemp("consortium")
    for party in (*SITES, "desk"):
        (root / party).mkdir()
    for site in SITES:
        mine = [{"text": row["text"]} for row in rows if row["hospital"] == site]
        texts.write_jsonl(root / site / "notes.jsonl", mine)
    texts.write_jsonl(root / "desk" / "all.jsonl", rows)
    hub, ca = (f"127.0.0.1:{deployment.free_port()}" for _ in range(2))
    replaced = {
        "hub.example.org:8443": hub,
        "0.0.0.0:8443": hub,
        "ca.example.org:8441": ca,
        "0.0.0.0:8441": ca,
        "hub.example.org": "127.0.0.1",
    }
    walk = Walk(root, replaced)
    try:
        for step in steps(GUIDE.read_text()):
            walk.take(step)
        assert not walk.running
        yield walk
    finally:
        walk.close()


def products(folder: Path) -> dict[str, Any]:
    """Module to the change of its weights, float64."""
    from safetensors.numpy import load_file

    tensors = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["lora_alpha"] == config["r"]
    names = {name.rsplit(".lora_", 1)[0] for name in tensors if ".lora_" in name}
    wide = {name: value.astype(np.float64) for name, value in tensors.items()}
    return {name: wide[f"{name}.lora_B.weight"] @ wide[f"{name}.lora_A.weight"] for name in sorted(names)}


def test_the_adapter_is_the_rehearsals(walked: Walk) -> None:
    deployed, rehearsed = (
        products(walked.root / "olga" / "first" / "adapter"),
        products(walked.root / "desk" / "rehearsal" / "adapter"),
    )
    assert deployed.keys() == rehearsed.keys()
    for name, wanted in rehearsed.items():
        # DESIGN §6: products in fp32 with one thread count, to 1e-6. One round's bound holds for three: they are the same bits.
        np.testing.assert_allclose(deployed[name], wanted, rtol=0, atol=1e-6)
    assert max(float(np.abs(wanted).max()) for wanted in rehearsed.values()) > 1e-3


def test_the_run_directory_is_as_agreed(walked: Walk) -> None:
    run = walked.root / "hub" / "runs" / "first"
    summary = json.loads((run / "summary.json").read_text())
    records = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
    assert summary["eval"]["view"] == "release"
    assert set(summary["eval"]["per_client"]) == set(SITES)
    assert summary["eval"]["final_loss"] < summary["eval"]["base_loss"]
    assert [record["clients"] for record in records] == [list(SITES)] * 3
    assert summary["client_ranks"] == {"north": 8, "south": 4, "west": 2}
    assert "<svg" in (run / "report.html").read_text()
    check = Path(os.environ.get("LAMINA_TEST_DATA") or "/nowhere").parent / "contract" / "check_run.py"
    if check.is_file():
        done = subprocess.run(
            [sys.executable, check, run], capture_output=True, text=True, env=environment(), check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_what_is_fetched_is_what_is_there(walked: Walk) -> None:
    fetched, run = walked.root / "olga" / "first", walked.root / "hub" / "runs" / "first"
    found = {path.relative_to(fetched).as_posix() for path in fetched.rglob("*") if path.is_file()}
    assert {"summary.json", "rounds.jsonl", "report.html", "events.jsonl", "adapter/adapter_model.safetensors"} <= found
    for name in found - {"events.jsonl"}:
        assert (fetched / name).read_bytes() == (run / name).read_bytes()
    # An operator gets no site's update, and no state of the coordinator.
    assert not any(name.startswith(("rounds/", "blobs/", "checkpoints/", "coordinator")) for name in found)


def test_the_log_is_witnessed_by_every_site(walked: Walk) -> None:
    (said,) = (said for text, said in walked.said.items() if "log verify" in text)
    for site in SITES:
        assert f"countersigned by '{site}': 3 heads" in said
        assert f"{site}-witness.txt: 3 of 3 kept heads are in the log" in said
    assert "verdict: intact" in said


def test_peft_loads_the_adapter(walked: Walk) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    tokens = torch.arange(2, 34).reshape(2, 16)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        base = AutoModelForCausalLM.from_pretrained(str(TINY), dtype=torch.float32)
        before = base(input_ids=tokens).logits
        adapted = PeftModel.from_pretrained(base, str(walked.root / "olga" / "first" / "adapter"))
        after = adapted(input_ids=tokens).logits
        merged = AutoModelForCausalLM.from_pretrained(
            str(walked.root / "olga" / "model" / "merged"), dtype=torch.float32
        )
        same = merged(input_ids=tokens).logits
    assert float((after - before).norm()) > 1e-3 * float(before.norm())
    torch.testing.assert_close(same, after, rtol=1e-4, atol=1e-4)


def test_a_site_audits_what_the_adapter_says_of_its_rows(walked: Walk) -> None:
    found = json.loads((walked.root / "north" / "first" / "audit" / "audit.json").read_text())
    assert (found["verdict"], found["subject"]["origin"]) == ("no-claim", "deployment")
    assert found["membership"]["of"] == "rows"
    assert found["membership"]["members"] > 0
    assert found["extraction"]["prompts"] > 0
    assert found["reconstruction"] == {}  # the coordinator kept no updates
    assert any("north" in limit for limit in found["limits"])


def test_no_text_leaves_a_site(walked: Walk) -> None:
    rows = [json.loads(line)["text"] for line in (walked.root / "desk" / "all.jsonl").read_text().splitlines()]
    long = [row.encode() for row in rows if len(row) > 30][:200]
    assert long
    away = [path for party in ("hub", "ca", "olga") for path in (walked.root / party).rglob("*") if path.is_file()]
    away += list(walked.root.glob("*.log"))
    for path in away:
        content = path.read_bytes()
        assert not any(row in content for row in long), path


def test_revoked_and_renewed_as_the_guide_says(walked: Walk) -> None:
    from lamina.protos import identity

    west = identity.load(walked.root / "west" / "identity").peer.serial
    ca = (walked.root / "ca" / "ca" / "ca.pem").read_bytes()
    assert identity.read_revocations(walked.root / "hub" / "crl.pem", ca).serials == {west}
    ledger = json.loads((walked.root / "ca" / "ca" / "issued.json").read_text())
    serials: Sequence[str] = [one["serial"] for one in ledger["certificates"] if one["name"] == "north"]
    assert len(serials) == 2
    assert f"{identity.load(walked.root / 'north' / 'identity').peer.serial:x}" == serials[-1]


def test_every_block_of_the_guide_is_run() -> None:
    page = GUIDE.read_text()
    fences = [line for line in page.splitlines() if line.startswith("```") and line != "```"]
    found = [step for step in steps(page) if step.what in ("bash", "yaml")]
    assert len(found) == len(fences)
    for step in found:
        # Who runs it can be read on the page too, where the fence's words are not shown.
        if step.what == "bash":
            assert step.text.startswith("# at ")
            assert all(party in step.text.splitlines()[0] for party in step.words[0].split(","))
