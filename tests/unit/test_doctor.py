"""`lamina doctor`: what it says of an installation, a machine and a site."""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from lamina.client import doctor, doctor_files
from lamina.client.commands.doctor import main
from lamina.client.doctor import Line, exit_code
from lamina.protos.config import DataConfig
from lamina.protos.errors import ConfigError
from lamina.protos.preflight import address
from tests import deployment
from tests.consortium import NOW, enrolled, new_ca
from tests.e2e.commands import failed, here


def only(lines: Iterable[Line]) -> Line:
    (line,) = lines
    return line


@pytest.fixture(autouse=True)
def _no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("grpc_proxy", "https_proxy", "http_proxy", "no_grpc_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)


def test_the_exit_code_is_of_the_gravest_failure() -> None:
    ok, warn = Line("ok", "a", ""), Line("warn", "a", "", trust=True)
    fail, trust = Line("FAIL", "a", ""), Line("FAIL", "a", "", trust=True)
    assert exit_code([]) == exit_code([ok, warn]) == 0
    assert exit_code([ok, fail]) == 2
    assert exit_code([trust, fail]) == exit_code([fail, trust]) == 5


# --- the installation


def installed(monkeypatch: pytest.MonkeyPatch, folder: Path, **distributions: tuple[str, list[str]]) -> None:
    """Make distributions with these versions and requirements the only ones."""
    for name, (version, requires) in distributions.items():
        info = folder / f"{name}-{version}.dist-info"
        info.mkdir(parents=True)
        lines = [f"Requires-Dist: {one}" for one in requires]
        text = [
            "Metadata-Version: 2.1",
            f"Name: {name}",
            f"Version: {version}",
            "Requires-Python: >=3.11",
            "Provides-Extra: client",
            *lines,
        ]
        (info / "METADATA").write_text("\n".join(text) + "\n")
    monkeypatch.setattr(sys, "path", [str(folder)])


def test_packages_within_their_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs = ["one<7,>=6", "two>=1; extra == 'client'", "three; extra == 'dev'", "four; python_version < '3'"]
    installed(monkeypatch, tmp_path, some=("0.1", needs), one=("6.5", []), two=("1.0", []))
    assert only(doctor.packages("some")) == Line("ok", "packages", "some 0.1 and what it needs are installed.")
    assert only(doctor.python("some")).level == "ok"


def test_packages_that_are_missing_or_out_of_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs = ["one<7", "gone>=1", "torch>=2; extra == 'client'", "two>=1; extra == 'client'"]
    installed(monkeypatch, tmp_path, some=("0.1", needs), one=("7.0", []), two=("0.9", []))
    found = {line.message.split()[0] + line.message.split()[1]: line for line in doctor.packages("some")}
    assert {key: line.level for key, line in found.items()} == {
        "expectedone<7,": "FAIL",
        "goneis": "FAIL",
        "torchis": "warn",
        "expectedtwo>=1,": "FAIL",
    }
    assert "got 7.0" in found["expectedone<7,"].message
    assert "A coordinator does not need it" in found["torchis"].message
    assert "pip install 'some[client]'" in found["torchis"].message


def test_an_interpreter_that_is_too_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, tmp_path, some=("0.1", []))
    monkeypatch.setattr("platform.python_version", lambda: "3.10.4")
    line = only(doctor.python("some"))
    assert line.level == "FAIL"
    assert "expected Python >=3.11" in line.message


def test_a_source_tree_without_an_installation_is_no_failure() -> None:
    assert only(doctor.packages("lamina-of-nowhere")).level == "warn"
    assert only(doctor.python("lamina-of-nowhere")).level == "ok"


def test_it_runs_where_there_is_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules.update(torch=None, transformers=None, peft=None)\n"
        "from lamina.client.commands.doctor import main\nsys.exit(main('doctor', ['--json', 'state=.']))"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment)
    found = json.loads(done.stdout)["findings"]
    (torch,) = [one for one in found if one["what"] == "devices"]
    assert torch["level"] == "warn"
    assert "This machine can coordinate, not train" in torch["message"]
    assert not any(tmp_path.iterdir())


def test_devices_are_named() -> None:
    assert all(line.level in ("ok", "warn") for line in doctor.devices())
    assert "threads" in next(doctor.devices()).message


def test_little_memory_and_a_broken_driver_are_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> int:
        raise RuntimeError("driver too old")

    monkeypatch.setattr(doctor, "_free_memory_bytes", lambda: 1024**3)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", broken)
    cpu, cuda = doctor.devices()
    assert (cpu.level, cuda.level) == ("warn", "warn")
    assert "1.07 GB of memory free. Close other programs." in cpu.message
    assert "driver too old" in cuda.message


# --- the machine


def test_state_leaves_nothing_behind(tmp_path: Path) -> None:
    line = only(doctor.state(tmp_path / "not" / "yet"))
    assert line.level == "ok"
    assert str(tmp_path) in line.message
    assert not any(tmp_path.iterdir())


def test_state_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    assert only(doctor.state(tmp_path / "file" / "below")).level == "FAIL"

    def failing(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", failing)
    assert "Input/output error" in only(doctor.state(tmp_path)).message


def test_a_full_disk_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1024**3)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert only(doctor.state(tmp_path)).level == "warn"


def test_a_port_that_is_taken_and_one_that_is_free() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = only(doctor.listening(f"127.0.0.1:{port}"))
        assert line.level == "FAIL"
        assert "Another program has it" in line.message
    assert only(doctor.listening(f"127.0.0.1:{port}")).level == "ok"
    assert "no such address" in only(doctor.listening("192.0.2.7:8443")).message  # TEST-NET-1, nobody's
    assert only(doctor.listening("a..b:8443")).level == "FAIL"


@pytest.mark.parametrize(
    ("text", "parsed"),
    [("hub:8443", ("hub", 8443)), ("[::1]:1", ("::1", 1)), ("10.0.0.1:65535", ("10.0.0.1", 65535))],
)
def test_addresses(text: str, parsed: tuple[str, int]) -> None:
    assert address("coordinator", text) == parsed


@pytest.mark.parametrize(
    "text",
    ["", "hub", ":8443", "hub:", "hub:x", "hub:65536", "::1:8443", "[hub:1]:2", "https://hub:1", "hub:٣", "hub:-1"],
)
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(ConfigError, match=r"coordinator=.*expected host:port"):
        address("coordinator", text)


# --- the site


def test_a_model_folder(tmp_path: Path) -> None:
    assert "no config.json" in only(doctor_files.base(tmp_path)).message
    (tmp_path / "config.json").write_text("{}")
    assert only(doctor_files.base(tmp_path)).level == "FAIL"
    (tmp_path / "pytorch_model.bin").write_text("")
    assert "a pickle, which is not loaded" in only(doctor_files.base(tmp_path)).message
    (tmp_path / "model.safetensors").write_text("")
    assert only(doctor_files.base(tmp_path)).level == "ok"


def test_a_policy(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    assert only(doctor_files.policy(path)).level == "FAIL"
    path.write_text("max_rounds: 3")
    path.chmod(0o644)
    assert only(doctor_files.policy(path)).message == f"{path} can be read."
    path.chmod(0o664)
    assert [line.level for line in doctor_files.policy(path)] == ["ok", "warn"]


def test_an_identity(tmp_path: Path) -> None:
    folder = enrolled(new_ca(tmp_path / "ca"), tmp_path / "site", "clinic")
    assert {line.level for line in doctor.identity(folder, NOW)} == {"ok"}
    soon = [line for line in doctor.identity(folder, NOW + timedelta(days=360)) if line.level != "ok"]
    assert [(line.what, line.level) for line in soon] == [("dates", "warn")]
    late = list(doctor.identity(folder, NOW + timedelta(days=366)))
    assert exit_code(late) == 5
    (folder / "current" / "tls.key").chmod(0o640)
    assert exit_code(list(doctor.identity(folder, NOW))) == 5
    assert exit_code(list(doctor.identity(tmp_path / "nowhere", NOW))) == 5


def test_a_proxy_that_grpc_would_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "http://user:secret@proxy:3128")
    first = next(doctor.coordinator(None, "127.0.0.1:1", NOW))
    assert (first.level, first.what) == ("warn", "proxy")
    assert "secret" not in first.message
    monkeypatch.setenv("no_proxy", "example.org,127.0.0.1")
    assert next(doctor.coordinator(None, "127.0.0.1:1", NOW)).what == "reach"


def test_without_certificates_only_the_loopback() -> None:
    line = only(doctor.coordinator(None, "hub.example.org:8443", NOW))
    assert (line.level, line.what, line.trust) == ("FAIL", "address", False)


def test_a_sites_text(tmp_path: Path) -> None:
    notes = tmp_path / "notes.jsonl"
    assert "expected a file, found none" in only(doctor_files.text(DataConfig(source=str(notes)))).message
    notes.write_text("\n")
    assert "expected rows, found none" in only(doctor_files.text(DataConfig(source=str(notes)))).message
    notes.write_text('{"text": "a note"}\n')
    assert only(doctor_files.text(DataConfig(source=str(notes)))).level == "ok"
    assert "expected this site's own text" in only(doctor_files.text(DataConfig())).message
    # Whether a hub id can be had is not known before it is fetched.
    assert only(doctor_files.text(DataConfig(source="someone/notes"))).level == "ok"


def test_a_schema(tmp_path: Path) -> None:
    path = tmp_path / "spec.json"
    assert only(doctor_files.schema(path)).level == "FAIL"
    path.write_text("{}")
    assert only(doctor_files.schema(path)).level == "FAIL"
    path.write_text(deployment.spec().to_json())
    assert "schema of synthetic, 2 modules" in only(doctor_files.schema(path)).message


# --- the command


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    code = main("doctor", words)
    return code, capsys.readouterr().out


def test_the_command_prints_a_line_for_each(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "packages", lambda: iter([Line("ok", "packages", "all there")]))
    code, out = run(capsys, f"state={tmp_path}", f"policy={tmp_path / 'none.yaml'}")
    assert code == 2
    assert [line.split()[1] for line in out.splitlines()] == ["python", "packages", "devices", "state", "policy"]
    assert out.splitlines()[-1].startswith("FAIL  policy ")
    code, out = run(capsys, f"state={tmp_path}", f"identity={tmp_path}", "--json")
    document: dict[str, Any] = json.loads(out)
    assert code == document["exit_code"] == 5
    assert document["findings"][-1]["level"] == "FAIL"
    assert run(capsys, f"state={tmp_path}")[0] == 0


def test_a_settings_file_is_looked_at_as_a_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def findings(*words: str) -> dict[str, Any]:
        document = json.loads(run(capsys, *words, "--json")[1])["findings"]
        return {one["what"]: one for one in document if one["what"] not in ("python", "packages", "devices", "state")}

    monkeypatch.chdir(tmp_path)
    Path("policy.yaml").write_text("max_rounds: 3")
    Path("notes.jsonl").write_text('{"text": "a note"}\n')
    Path("site.yaml").write_text("client: {policy: policy.yaml, identity: none}\ndata: {source: notes.jsonl}\n")
    found = findings("config=site.yaml")
    assert {what: one["level"] for what, one in found.items()} == {
        "settings": "ok",
        "policy": "ok",
        "data": "ok",
        "model": "ok",
        "files": "FAIL",
    }
    assert findings("config=site.yaml", "data=gone.jsonl")["data"]["level"] == "FAIL"
    Path("hub.yaml").write_text("coordinator: {spec: spec.json, listen: '127.0.0.1:0'}\n")
    found = findings("config=hub.yaml")
    assert {what: one["level"] for what, one in found.items()} == {"settings": "ok", "spec": "FAIL", "listen": "ok"}
    Path("hub.yaml").write_text("coordinator: {lisen: x}\n")
    assert "Did you mean coordinator.listen?" in findings("config=hub.yaml")["settings"]["message"]


def test_each_side_is_told_what_it_sets_for_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = failed(here(capsys, "coordinator", "insecure=true", "data=a.jsonl", f"output={tmp_path / 'run'}"))
    assert "data.source: each site sets that for itself" in text
    assert not (tmp_path / "run").exists()
    site = [
        "client",
        "insecure=true",
        "client.name=north",
        "client.coordinator=127.0.0.1:1",
        f"client.state={tmp_path}",
    ]
    assert "expected this site's own text" in failed(here(capsys, *site))
    assert "expected a file, found none" in failed(here(capsys, *site, f"data={tmp_path / 'nope.jsonl'}"))


@pytest.mark.parametrize(
    "words",
    [
        ["coordinator=hub:8443"],
        ["coordinator=hub:8443", "identity=site", "insecure=true"],
        ["coordinator=hub", "insecure=true"],
        ["listen=here"],
        ["identty=site"],
        ["site"],
        ["insecure=maybe"],
    ],
)
def test_settings_that_cannot_be_meant(words: list[str]) -> None:
    with pytest.raises(ConfigError):
        main("doctor", words)


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    code, out = run(capsys, "--help")
    assert code == 0
    assert "usage: lamina doctor" in out
