"""Attack: a model directory that carries code. Nothing of it runs; pickled weights are refused."""

from __future__ import annotations

import builtins
import contextlib
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest

from lamina.client.loading import BaseOptions, load_base
from lamina.protos.errors import ConfigError

MARKER = "LAMINA_ATTACK_MARKER"


class Bomb:
    """Writes a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self._path),)


def load(source: Path, task: str = "causal-lm") -> None:
    labels = ("a", "b") if task == "sequence-classification" else ()
    load_base(BaseOptions(str(source), task=task, labels=labels, device="cpu"))


@pytest.fixture
def copy(llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama, tmp_path / "model"))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "adapter_model.bin", "model.pt"])
def test_pickled_weights_are_refused_unread(copy: Path, tmp_path: Path, name: str) -> None:
    (copy / "model.safetensors").unlink()
    (copy / name).write_bytes(pickle.dumps(Bomb(tmp_path / MARKER)))
    with pytest.raises(ConfigError, match="safetensors"):
        load(copy)
    assert not (tmp_path / MARKER).exists()


def test_a_pickle_beside_safetensors_is_left_alone(copy: Path, tmp_path: Path) -> None:
    (copy / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / MARKER)))
    load(copy)
    assert not (tmp_path / MARKER).exists()


def test_a_pickle_under_the_name_of_safetensors_is_refused(copy: Path, tmp_path: Path) -> None:
    (copy / "model.safetensors").write_bytes(pickle.dumps(Bomb(tmp_path / MARKER)))
    with pytest.raises(ConfigError):
        load(copy)
    assert not (tmp_path / MARKER).exists()


@pytest.mark.parametrize("kept", [0.001, 0.5, 0.999])
def test_truncated_weights_are_a_config_error(copy: Path, kept: float) -> None:
    weights = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(weights[: int(len(weights) * kept)])
    with pytest.raises(ConfigError, match=r"model\.source"):
        load(copy)


def with_code(folder: Path, marker: Path, model_type: str, where: str) -> None:
    """Add a module that leaves a mark when imported, and point the config at it."""
    # It ends by raising, so that nothing of it is registered with transformers for the tests that follow.
    code = f"import os\nos.mkdir({str(marker)!r})\nraise OSError('from the model directory')\n"
    (folder / "evil.py").write_text(code)
    if where == "config":
        document = json.loads((folder / "config.json").read_text()) | {"model_type": model_type}
        document["auto_map"] = {
            "AutoConfig": "evil.LlamaConfig",
            "AutoModelForCausalLM": "evil.LlamaForCausalLM",
            "AutoModelForSequenceClassification": "evil.LlamaForSequenceClassification",
        }
        (folder / "config.json").write_text(json.dumps(document))
    else:
        document = json.loads((folder / "tokenizer_config.json").read_text())
        document |= {
            "tokenizer_class": "EvilTokenizer",
            "auto_map": {"AutoTokenizer": [None, "evil.LlamaTokenizerFast"]},
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("model_type", "where"),
    [
        ("llama", "config"),
        ("llama", "tokenizer"),
        ("evil", "config"),
        ("evil", "tokenizer"),
    ],
)
@pytest.mark.parametrize("task", ["causal-lm", "sequence-classification"])
def test_custom_code_never_runs_whatever_is_answered(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, model_type: str, task: str
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(builtins, "input", lambda prompt="": asked.append(prompt) or "y")  # type: ignore[func-returns-value]
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    with_code(copy, tmp_path / MARKER, model_type, where)
    with contextlib.suppress(ConfigError):
        load(copy, task)
    assert not (tmp_path / MARKER).exists()
    assert asked == []


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", "{"),
        ("config.json", "{}"),
        ("tokenizer.json", "{"),
        ("config.json", "[]"),
        ("config.json", "null"),
    ],
)
def test_malformed_model_files_are_config_errors(copy: Path, name: str, content: str) -> None:
    (copy / name).write_text(content)
    with pytest.raises(ConfigError):
        load(copy)
