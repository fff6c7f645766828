"""The committed code of the protocols is what their .proto files generate, with a tool that fits the protobuf we allow."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from google.protobuf import __version__ as protobuf_version

ROOT = Path(__file__).resolve().parents[2]
PROTOS = sorted(path.stem for path in (ROOT / "protos").glob("*.proto"))


@pytest.mark.parametrize("name", PROTOS)
def test_generated_code_is_up_to_date(name: str, tmp_path: Path) -> None:
    out = [f"--python_out={tmp_path}", f"--pyi_out={tmp_path}", f"--grpc_python_out={tmp_path}"]
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I", ".", *out, f"lamina/protos/{name}.proto"]
    subprocess.run(command, cwd=ROOT, check=True, timeout=60)
    for suffix in ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py"):
        made = (tmp_path / "lamina" / "protos" / f"{name}{suffix}").read_text()
        assert (ROOT / "protos" / f"{name}{suffix}").read_text() == made, f"run `make protos`: {name}{suffix} is stale"


def test_the_generator_fits_the_protobuf_that_we_allow() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert any(one.startswith("protobuf") and one.endswith("<7") for one in project["dependencies"])
    assert any(one.startswith("grpcio-tools==") for one in project["optional-dependencies"]["dev"])
    assert int(protobuf_version.split(".")[0]) == 6
    # Generated code refuses a runtime older than its generator: the lower bound must be the generator's.
    stamp = (ROOT / "protos" / "coordinator_pb2.py").read_text().partition("# Protobuf Python Version: ")[2].split()[0]
    assert f"protobuf>={stamp},<7" in project["dependencies"]
