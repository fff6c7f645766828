"""What is installed is what is in the checkout: wheel, sdist, a coordinator without torch, and the whole thing."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import lamina
from tests.e2e.commands import ROOT, environment

PARTS = ("protos", "strategies", "server", "client", "simulations", "audits")
# What a coordinator runs, and what it must run without.
COORDINATOR = ("protos", "strategies", "server")
FOREIGN = ("torch", "transformers", "peft", "datasets")


def run(*words: str | Path, cwd: Path | None = None, timeout_s: int = 900) -> str:
    """A command that must succeed; without this checkout on the path."""
    clean = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONWARNINGS")}
    done = subprocess.run(
        [str(word) for word in words],
        cwd=cwd,
        env=clean,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == 0, f"{words}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def tracked() -> list[str]:
    """The files of a clean clone, links included; files that are new and not ignored count too."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("not a git checkout: a clean copy cannot be told from its build products")
    return [name for name in done.stdout.splitlines() if os.path.lexists(ROOT / name)]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = tmp_path_factory.mktemp("tree")
    for name in tracked():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, copy / name, follow_symlinks=False)
    return copy


@pytest.fixture(scope="module")
def built(tree: Path) -> tuple[Path, Path, Path]:
    """The sdist, the wheel made from it, and the wheel made from the tree."""
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", tree / "dist", tree)
    run(sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", tree / "direct", tree)
    (sdist,) = (tree / "dist").glob("*.tar.gz")
    (wheel,) = (tree / "dist").glob("*.whl")
    (direct,) = (tree / "direct").glob("*.whl")
    return sdist, wheel, direct


def members(wheel: Path) -> dict[str, int]:
    with zipfile.ZipFile(wheel) as file:
        return {info.filename: info.CRC for info in file.infolist() if not info.filename.endswith("RECORD")}


def test_the_wheel_has_every_module_and_file_and_no_tests(built: tuple[Path, Path, Path]) -> None:
    names = set(members(built[1]))
    for part in PARTS:
        sources = [name for name in tracked() if name.startswith(f"{part}/") and name.endswith(".py")]
        assert sources
        assert {f"lamina/{name}" for name in sources} <= names
    tiny = {f"lamina/{name}" for name in tracked() if name.startswith("simulations/tiny/")}
    assert len(tiny) >= 5
    assert tiny <= names
    assert {"lamina/__init__.py", "lamina/__main__.py", "lamina/py.typed"} <= names
    assert {name.split("/")[0] for name in names} == {
        "lamina",
        next(n for n in names if n.endswith("METADATA")).split("/")[0],
    }
    assert not [name for name in names if {"tests", "benchmarks", "__pycache__"} & set(name.split("/"))]
    assert not [name for name in names if name.rsplit("/", 1)[-1].startswith("test_")]
    assert [name for name in names if name.endswith("LICENSE")]


def test_the_sdist_gives_the_same_wheel(built: tuple[Path, Path, Path]) -> None:
    sdist, wheel, direct = built
    assert members(wheel) == members(direct)
    with tarfile.open(sdist) as file:
        names = {name.split("/", 1)[1] for name in file.getnames() if "/" in name}
    assert {"pyproject.toml", "LICENSE", "README.md", "simulations/tiny/model.safetensors"} <= names
    assert not [name for name in names if name.startswith((".venv", "dist", "outputs")) or "__pycache__" in name]


def modules(part: str) -> list[str]:
    found = []
    for name in tracked():
        if name.startswith(f"{part}/") and name.endswith(".py"):
            dotted = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
            found.append(f"lamina.{dotted}")
    return found


def fresh(folder: Path, *install: str | Path) -> Path:
    """The Python of a new virtual environment with something installed in it."""
    venv.create(folder, with_pip=True, symlinks=True)
    python = folder / "bin" / "python"
    run(
        python,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "-c",
        ROOT / "constraints.txt",
        *install,
    )
    return python


def imported(python: Path, names: list[str], cwd: Path) -> None:
    code = f"import importlib\nfor name in {names!r}:\n    importlib.import_module(name)\n"
    run(python, "-c", code, cwd=cwd)


def test_a_coordinator_installs_without_torch(built: tuple[Path, Path, Path], tmp_path: Path) -> None:
    python = fresh(tmp_path / "core", built[1])
    absent = f"import importlib.util as u; print([n for n in {FOREIGN!r} if u.find_spec(n)])"
    assert run(python, "-c", absent, cwd=tmp_path).strip() == "[]"
    imported(python, [name for part in COORDINATOR for name in modules(part)], tmp_path)
    command = python.parent / "lamina"
    assert "usage:" in run(command, "--help", cwd=tmp_path)
    assert "usage:" in run(command, "report", "--help", cwd=tmp_path)
    done = subprocess.run([str(command), "simulate"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "lamina-fl[" in done.stderr
    assert "Traceback" not in done.stderr


def test_everything_installs_and_imports(built: tuple[Path, Path, Path], tmp_path: Path) -> None:
    python = fresh(tmp_path / "all", f"lamina-fl[all] @ {built[1].as_uri()}")
    imported(python, [name for part in PARTS for name in modules(part)], tmp_path)
    assert "usage: lamina simulate" in run(python.parent / "lamina", "simulate", "--help", cwd=tmp_path)


def test_the_checkout_is_what_is_imported() -> None:
    assert lamina.__file__ is not None
    assert Path(lamina.__file__).resolve().parent == ROOT / "lamina"
    for part in PARTS:
        link = ROOT / "lamina" / part
        assert link.is_symlink()
        assert not os.path.isabs(os.readlink(link))
        assert link.resolve() == ROOT / part
        assert importlib.import_module(f"lamina.{part}").__name__ == f"lamina.{part}"


def test_the_coordinators_side_imports_with_torch_out_of_reach(tmp_path: Path) -> None:
    names = [name for part in COORDINATOR for name in modules(part)]
    code = f"""
import importlib, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {FOREIGN!r}:
            raise ImportError(name + " is out of reach")
sys.meta_path.insert(0, Refuse())
for name in {names!r}:
    importlib.import_module(name)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
