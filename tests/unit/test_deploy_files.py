"""The files in deploy/, and what the guide says in words, against the code: keys, options, paths and messages that are there."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from lamina.__main__ import COMMANDS
from lamina.client import policy
from lamina.client.commands import agent, doctor
from lamina.protos import compose
from lamina.protos.config import SITE_KEYS, known_keys
from lamina.server.port import listen

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
GUIDE = ROOT / "docs" / "multi-site.md"
UNITS = ("coordinator.service", "client.service")
IMAGES = ("Dockerfile.coordinator", "Dockerfile.client")
_WORD = re.compile(r"^[a-z_.]+=\S")


def leaves(node: Any, path: str = "") -> Iterator[str]:
    if not isinstance(node, dict):
        yield path
        return
    for key, value in node.items():
        yield from leaves(value, f"{path}.{key}" if path else key)


def loaded(name: str) -> Any:
    return yaml.safe_load((DEPLOY / name).read_text())


def unit(name: str) -> dict[str, list[str]]:
    """Setting to its values, lines that go on put together."""
    found: dict[str, list[str]] = {}
    for line in (DEPLOY / name).read_text().replace("\\\n", " ").splitlines():
        key, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            found.setdefault(key, []).append(value)
    return found


def instructions(name: str) -> list[tuple[str, str]]:
    """A Dockerfile's instructions with what follows them, lines that go on put together."""
    text = re.sub(r"^#.*\n", "", (DEPLOY / name).read_text(), flags=re.M).replace("\\\n", " ")
    return [(line.split()[0], line.partition(" ")[2]) for line in text.splitlines() if line.strip()]


# Settings.


@pytest.mark.parametrize("name", ["coordinator.yaml", "site.yaml"])
def test_settings_are_of_known_keys(name: str) -> None:
    assert set(leaves(loaded(name))) <= set(known_keys())
    compose.from_words(["--config", str(DEPLOY / name)])


def test_a_site_sets_only_what_is_its_own() -> None:
    for key in leaves(loaded("site.yaml")):
        assert key.startswith(agent._SECTIONS) or key in agent._KEYS


def test_a_site_may_set_all_that_the_terms_leave_to_it() -> None:
    assert set(SITE_KEYS) <= set(agent._KEYS)


def test_the_policy_file_is_the_default_policy() -> None:
    assert policy.read(DEPLOY / "policy.yaml") == policy.Policy()


@pytest.mark.parametrize("name", ["coordinator.yaml", "site.yaml"])
def test_the_guide_shows_the_files_as_they_are(name: str) -> None:
    shown = re.search(rf"^```yaml \S+ {name}\n(.*?)^```$", GUIDE.read_text(), re.M | re.S)
    assert shown is not None
    assert shown[1] == (DEPLOY / name).read_text()


# systemd.


@pytest.mark.parametrize("name", UNITS)
def test_units_start_a_command_that_is_there(name: str) -> None:
    (start,) = unit(name)["ExecStart"]
    binary, command, *words = start.split()
    assert binary.endswith("/bin/lamina")
    assert command in COMMANDS
    settings = [word for word in words if _WORD.match(word)]
    assert {word.partition("=")[0] for word in settings} <= set(known_keys())
    config = (DEPLOY / Path(words[words.index("--config") + 1]).name).read_text()
    rest = [word for word in words if word.startswith("--") and word != "--config"]
    assert rest == ["--json"]
    assert yaml.safe_load(config)


def test_the_unit_allows_as_many_files_as_the_coordinator_asks_for() -> None:
    assert unit("coordinator.service")["LimitNOFILE"] == [str(listen._MOST_FILES)]


@pytest.mark.parametrize("name", UNITS)
def test_units_are_hardened_and_restart_what_a_restart_mends(name: str) -> None:
    found = unit(name)
    for key, value in {
        "ProtectSystem": "strict",
        "NoNewPrivileges": "yes",
        "ProtectHome": "yes",
        "CapabilityBoundingSet": "",
        "Restart": "on-failure",
        "RestartPreventExitStatus": "2 4 5",
        "KillSignal": "SIGTERM",
        "UMask": "0077",
    }.items():
        assert found[key] == [value], key
    assert found["User"] != ["root"]
    (state,) = found["StateDirectory"]
    assert found["WorkingDirectory"] == [f"/var/lib/{state}"]
    # What is written lies in the state directory, the only place that ProtectSystem=strict leaves writable.
    (start,) = found["ExecStart"]
    for word in start.split():
        if word.startswith(("client.state=", "coordinator.identity=", "client.identity=", "output=")):
            assert word.partition("=")[2].startswith(f"/var/lib/{state}/")
    drain = re.search(r"coordinator\.drain_s=(\d+)", start)
    assert int(found["TimeoutStopSec"][0]) > int(drain[1] if drain else 0)


@pytest.mark.parametrize("name", UNITS)
def test_systemd_understands_the_units(name: str, tmp_path: Path) -> None:
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("systemd-analyze is not installed: the units are read by our own rules alone")
    # The programs that the unit starts and the user that it runs as are not on this machine.
    text = (DEPLOY / name).read_text().replace("/opt/lamina/bin/lamina", sys.executable)
    (tmp_path / f"lamina-{name}").write_text(text)
    done = subprocess.run(
        [analyze, "verify", "--man=no", str(tmp_path / f"lamina-{name}")], capture_output=True, text=True, check=False
    )
    said = [line for line in done.stderr.splitlines() if f"lamina-{name}" in line]
    assert not said, done.stderr


# Images.


@pytest.mark.parametrize("name", IMAGES)
def test_images_are_pinned_and_do_not_run_as_root(name: str) -> None:
    found = instructions(name)
    bases = [rest.split()[0] for word, rest in found if word == "FROM"]
    assert bases
    assert all(re.fullmatch(r"[a-z0-9./-]+:\d+\.\d+\.\d+-[a-z0-9-]+", base) for base in bases)
    users = [rest for word, rest in found if word == "USER"]
    assert users
    assert users[-1].split(":")[0] not in ("root", "0")
    assert not any(word == "ADD" for word, _ in found)
    (entry,) = (rest for word, rest in found if word == "ENTRYPOINT")
    assert entry == '["lamina"]'
    (command,) = (rest for word, rest in found if word == "CMD")
    words = yaml.safe_load(command)
    assert words[0] in COMMANDS
    assert (DEPLOY / words[words.index("--config") + 1]).is_file()
    runs = " ".join(rest for word, rest in found if word == "RUN")
    assert not re.search(r"(curl|wget)[^|]*\|\s*(ba)?sh|\bsudo\b|chmod\s+777|apt-get\s+upgrade", runs)
    assert runs.count("pip install") == runs.count("pip install --no-cache-dir --constraint /tmp/constraints.txt")


@pytest.mark.parametrize("name", IMAGES)
def test_images_copy_what_is_there_and_no_secret(name: str) -> None:
    for word, rest in instructions(name):
        if word == "COPY":
            assert all((ROOT / source).exists() for source in rest.split()[:-1])
        assert not re.search(r"(?i)password|passphrase|secret|token|\.key\b|\.pem\b", rest)
    ignored = (DEPLOY / f"{name}.dockerignore").read_text().splitlines()
    assert "*" in ignored
    for line in ignored:
        assert not line.startswith("!") or (ROOT / line[1:]).exists()
    # All that the wheel is made of.
    packaged = re.search(r"wheel\]\s*only-include = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.S)
    assert packaged is not None
    assert {one.split("/")[0] for one in re.findall(r'"(.*?)"', packaged[1])} <= {line[1:] for line in ignored}


def test_only_the_clients_image_has_torch() -> None:
    assert "torch" not in " ".join(rest for _, rest in instructions("Dockerfile.coordinator"))
    assert "torch" in " ".join(rest for _, rest in instructions("Dockerfile.client"))


# Compose.


def test_compose_publishes_one_port_and_names_files_that_are_there() -> None:
    found = loaded("compose.yaml")
    services: Mapping[str, Any] = found["services"]
    names = loaded("coordinator.yaml")["clients"]["names"]
    assert set(services) == {"coordinator", *names}
    assert {name: service.get("ports") for name, service in services.items() if service.get("ports")} == {
        "coordinator": ["8443:8443"]
    }
    for name, service in services.items():
        assert not service["image"].endswith(":latest")
        assert ":" in service["image"]
        assert (DEPLOY / service["build"]["context"]).resolve() == ROOT
        assert (ROOT / service["build"]["dockerfile"]).is_file()
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert not service.get("privileged")
        mounted = {entry.split(":")[1]: entry.split(":")[2:] for entry in service["volumes"]}
        writable = {target for target, mode in mounted.items() if mode != ["ro"]}
        assert writable == ({"/lamina/runs"} if name == "coordinator" else {"/lamina/state"})
        config = "coordinator.yaml" if name == "coordinator" else "site.yaml"
        assert f"/lamina/{config}" in mounted
        # Every path of the settings is a mounted one.
        for key in ("identity", "policy", "state", "spec"):
            section = loaded(config).get("coordinator" if name == "coordinator" else "client", {})
            if key in section:
                assert any(f"/lamina/{section[key]}".startswith(target) for target in mounted), section[key]


def test_composes_commands_and_health_checks_are_ours() -> None:
    for name, service in loaded("compose.yaml")["services"].items():
        kind, program, command, *words = service["healthcheck"]["test"]
        assert (kind, program, command) == ("CMD", "lamina", "doctor")
        assert {word.partition("=")[0] for word in words} <= doctor_keys()
        (dialled,) = (word.partition("=")[2] for word in words if word.startswith("coordinator="))
        assert dialled == loaded("site.yaml")["client"]["coordinator"]
        for word in service.get("command", ())[1:]:
            assert word.startswith("--") or word == "coordinator.yaml" or word.partition("=")[0] in known_keys(), name


def doctor_keys() -> set[str]:
    return set(re.findall(r"\[(\w+)=", doctor._HELP))


def test_docker_understands_the_compose_file() -> None:
    docker = shutil.which("docker")
    if docker is None or subprocess.run([docker, "compose", "version"], capture_output=True, check=False).returncode:
        pytest.skip("docker compose is not installed: compose.yaml is read by our own rules alone")
    done = subprocess.run(
        [docker, "compose", "-f", str(DEPLOY / "compose.yaml"), "config", "--quiet"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


# Words.


def source_text() -> str:
    """All code on one line, strings that go on over lines put together, as their reader sees them."""
    files = [one for part in ("protos", "server", "client") for one in (ROOT / part).rglob("*.py")]
    text = "\n".join(one.read_text() for one in files)
    return re.sub(r"""["']\s*\n\s*f?["']""", "", text)


def test_the_guides_error_texts_are_in_the_code() -> None:
    _, _, section = GUIDE.read_text().partition("## 12. Troubleshooting")
    rows = [line.split(" | ")[0] for line in section.partition("\n## ")[0].splitlines() if line.startswith("| `")]
    assert len(rows) > 15
    code = source_text()
    missing = [one for row in rows for one in re.findall(r"`(.*?)`", row) if one.strip() not in code]
    assert not missing


def test_the_guides_keys_are_known() -> None:
    page = GUIDE.read_text() + (DEPLOY / "README.md").read_text() + (ROOT / "docs" / "run-directory.md").read_text()
    sections = {key.partition(".")[0] for key in known_keys() if "." in key}
    named = {one for one in re.findall(r"`([a-z]+\.[a-z_]+)(?:=[^`]*)?`", page) if one.partition(".")[0] in sections}
    named -= {"coordinator.yaml", "coordinator.service", "client.service", "coordinator.sqlite"}
    assert named
    assert named <= set(known_keys())


def test_the_reasons_of_rejections_are_those_of_the_code() -> None:
    _, _, section = (ROOT / "docs" / "run-directory.md").read_text().partition("## Reasons of rejections")
    listed = {
        one
        for line in section.splitlines()
        if line.startswith("| `")
        for one in re.findall(r"`(.*?)`", line.split(" | ")[0])
    }
    code = source_text()
    assert not [one for one in listed if f'"{one}"' not in code]
    named = re.findall(r'(?:_Refused|BadStatement|UpdateRejected)\(\s*"([a-z-]+)"', code)
    assert set(named) <= listed


def test_links_lead_somewhere() -> None:
    for page in (GUIDE, DEPLOY / "README.md", ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert target.startswith("http") or (page.parent / target).exists(), f"{page.name}: {target}"
