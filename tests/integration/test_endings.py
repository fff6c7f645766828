"""What the files of a deployment say of its end: stopped early, with sites that left, were revoked, or never came."""

from __future__ import annotations

import json
import re
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lamina.server import operate
from lamina.server.report import load_run, render
from lamina.server.store import run_directory
from tests import consortium, deployment
from tests.hostile import eventually

EVERYONE = ("east", "north", "south", "west")


@dataclass
class Held(deployment.Synthetic):
    """Trains round 2 only when it is let."""

    gate: threading.Event = field(default_factory=threading.Event)

    def train(self, instruction: Any, progress: Any, allow: Any) -> Any:
        while instruction.round == 2 and not self.gate.wait(0.05):
            progress(1)
        return super().train(instruction, progress, allow)


def test_a_stopped_run_says_so_and_who_was_not_there(tmp_path: Path) -> None:
    who = deployment.certificates(tmp_path / "pki", EVERYONE)
    (tmp_path / "spec.json").write_text(deployment.spec().to_json())
    words = deployment.words(
        tmp_path / "spec.json",
        f"coordinator.identity={who['coordinator']}",
        f"coordinator.revocations={who['ca'] / 'crl.pem'}",
        f"clients.names=[{','.join(EVERYONE)}]",
        "clients.count=4",
        "clients.ranks=[4,3,2,2]",
        "clients.start=3",
        "clients.deadline_s=60",
        "rounds=50",
    )
    gate = threading.Event()
    with deployment.coordinator(tmp_path / "run", words) as running:
        try:
            agents = {
                name: deployment.agent(name, running.port, tmp_path / name, who[name], worker=Held(name, gate=gate))
                for name in EVERYONE[1:]
            }
            threads = [deployment.in_thread(agent)[0] for agent in agents.values()]
            eventually(lambda: running.path.joinpath("rounds.jsonl").read_text() != "")
            eventually(lambda: all(one._listener.at[0] == 2 for one in agents.values()))
            consortium.revoked(who["ca"], "west")
            agents["south"]._leave()
            agents["south"].stop()
            left = '"kind":"leave"'
            eventually(lambda: running.path.joinpath("events.jsonl").read_text().count(left) == 2)
            with operate.dialled(f"127.0.0.1:{running.port}", str(who["op"]), False, "operator") as remote:
                remote.stop(False)
            gate.set()
            assert running.join() == 0
            for thread in threads:
                thread.join(30)
        finally:
            gate.set()
    summary = json.loads((running.path / "summary.json").read_text())
    assert (summary["ended"], summary["rounds"], summary["clients"]) == ("stopped", 2, 3)
    assert summary["gone"] == {"east": "absent", "south": "left", "west": "revoked"}
    assert (summary["coordinator"], summary["consortium"]) == ("coordinator", "hospitals")
    assert summary["base"]["weights"] == "ab" * 32
    last = json.loads((running.path / "events.jsonl").read_text().splitlines()[-1])
    assert summary["log"]["n"] == last["n"] - 1
    rejections = run_directory.read_records(running.path)[1]["rejections"]
    assert sorted(rejections, key=lambda one: one["client_id"]) == [
        {"client_id": "south", "reason": "failed", "code": "left"},
        {"client_id": "west", "reason": "failed", "code": "revoked"},
    ]
    page = render([load_run(running.path)])
    assert "An operator stopped the run after 2 of 50 rounds." in page
    assert "Site south left the run; its updates count in 1 round." in page
    card = (running.path / "adapter" / "README.md").read_text()
    assert "Trained by 3 clients over 2 of 50 rounds" in card
    assert "| | base | as each site received it |" in card
    _, _, listed = (
        (deployment.ROOT / "docs" / "run-directory.md").read_text().partition("Kinds of records in `events.jsonl`:")
    )
    kinds = {json.loads(line)["kind"] for line in (running.path / "events.jsonl").read_text().splitlines()}
    assert kinds <= set(re.findall(r"`(\w+)`", listed.partition(".\n")[0]))
    config = (running.path / "config.yaml").read_text()
    assert not {"stdlib", "holdout", "tiny", "partition", "dropout_rate"} & set(config.replace(":", " ").split())
