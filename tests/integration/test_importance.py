"""Ranks by importance: the singular values are those of the whole gradient, and a run with them is exact and can be resumed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lamina.client.data import Encoder, Example
from lamina.client.loading import BaseOptions, load_base
from lamina.client.losses import collate, losses, pad_id
from lamina.client.model import Base, training_mode
from lamina.client.rows import load_rows
from lamina.client.sizing import importance
from lamina.client.train import batches
from lamina.protos import ranks as ranking
from lamina.protos import seeds
from lamina.protos.config import Config, TrainConfig
from lamina.protos.errors import CheckpointError, ConfigError, DataError, TrainingError
from lamina.server.store.base import Completed
from lamina.simulations.prepare import prepare
from lamina.simulations.run import simulate
from tests import texts
from tests.runs import Quiet, config_of, small

IMPORTANCE = ("lora.allocation=importance", "strategy=residual")


def loaded(source: Path, **more: Any) -> Base:
    return load_base(BaseOptions(str(source), **more))


def examples_for(base: Base, notes: Path, length: int = 24) -> list[Example]:
    config = Config()
    rows = load_rows(str(notes), config.data)
    return Encoder(base.tokenizer, config.data, "causal-lm", (), length).examples(rows)


def sketch(base: Base, columns: int) -> dict[str, int]:
    return {module: base.spec.clamped(columns, module) for module in base.spec.modules}


def whole_gradients(base: Base, examples: list[Example], config: TrainConfig) -> Mapping[str, Any]:
    """G of every adapted weight, by autograd on the weight itself, in float64, over the batches that scoring draws."""
    stream = batches(examples, config.batch_size, seeds.stream(0, "importance", ""))
    drawn = list(islice(stream, importance.BATCHES * config.accumulation))
    weights = {m: base.layer(m).base_layer.weight for m in base.spec.modules}
    base.model.double()
    for weight in weights.values():
        weight.requires_grad_(True)
    count = 0
    with training_mode(base):
        for batch in drawn:
            total, _, targets = losses(base, collate(batch, pad_id(base), base.device))
            total.backward()  # type: ignore[no-untyped-call]
            count += targets
    found = {}
    for module, weight in weights.items():
        gradient = weight.grad.numpy() / count
        found[module] = gradient.T if base.spec.fan_in_fan_out else gradient
        weight.grad = None
        weight.requires_grad_(False)
    base.model.float()
    return found


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_values_are_those_of_the_whole_gradient(kind: str, notes: Path, request: pytest.FixtureRequest) -> None:
    base = loaded(request.getfixturevalue(kind))
    for module in base.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # drawn otherwise in float64
    config = TrainConfig(batch_size=4, micro_batch=2)
    examples = examples_for(base, notes)
    whole = importance.scores(base, examples, sketch(base, 10_000), config, 0)
    few = importance.scores(base, examples, sketch(base, 6), config, 0)
    expected = whole_gradients(base, examples, config)
    assert set(whole) == set(base.spec.modules)
    for module, gradient in expected.items():
        values = np.linalg.svd(gradient, compute_uv=False)
        assert len(whole[module]) == min(base.spec.modules[module])
        # The forward pass is in float32.
        np.testing.assert_allclose(whole[module], values, atol=1e-5 * values[0], rtol=1e-4)
        # A sketch never finds more than there is, and the largest almost in full.
        assert (few[module] <= values[:6] * (1 + 1e-4) + 1e-7).all()
        assert few[module][0] >= 0.8 * values[0]


def test_the_same_seed_gives_the_same_bits_and_nothing_is_left_behind(llama: Path, notes: Path) -> None:
    base = loaded(llama)
    examples = examples_for(base, notes)
    before = {name: value.clone() for name, value in base.model.state_dict().items() if "lora" not in name}
    config = TrainConfig(batch_size=4)
    first, again, other = (importance.scores(base, examples, sketch(base, 4), config, seed) for seed in (3, 3, 4))
    assert all(first[m].tobytes() == again[m].tobytes() for m in first)
    assert any(first[m].tobytes() != other[m].tobytes() for m in first)
    assert empty(base)
    after = base.model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def empty(base: Base) -> bool:
    layers = [base.layer(module) for module in base.spec.modules]
    return not base.model.training and all(
        slot["default"].weight.numel() == 0 for one in layers for slot in (one.lora_A, one.lora_B)
    )


def test_micro_batches_and_activations_computed_again_change_nothing_but_rounding(llama: Path, notes: Path) -> None:
    base, again = loaded(llama), loaded(llama, checkpointing=True)
    examples = examples_for(base, notes)
    whole = importance.scores(base, examples, sketch(base, 4), TrainConfig(batch_size=4), 0)
    split = importance.scores(again, examples, sketch(base, 4), TrainConfig(batch_size=4, micro_batch=1), 0)
    for module in whole:
        np.testing.assert_allclose(whole[module], split[module], rtol=1e-4, atol=1e-5 * whole[module][0])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("number_format", ["int8", "nf4"])
def test_a_quantised_base_is_scored_too(number_format: str, notes: Path) -> None:
    base, coarse = loaded(Path("tiny")), loaded(Path("tiny"), format=number_format)
    examples, config = examples_for(base, notes), TrainConfig(batch_size=4)
    found = [importance.scores(one, examples, sketch(base, 8), config, 0) for one in (base, coarse)]
    ratios = [found[1][module][0] / found[0][module][0] for module in found[0]]
    assert 0.8 < float(np.median(ratios)) < 1.25


def test_dropout_is_the_same_in_both_passes(bert: Path, questions: Path) -> None:
    """Else they would sketch two matrices: with full sketches the norm is that of the gradient, which the first pass has."""
    base = loaded(bert, task="sequence-classification", labels=texts.LABELS)
    config = config_of("task=sequence-classification", "data.label_column=category", f"data={questions}")
    encoder = Encoder(base.tokenizer, config.data, config.task, texts.LABELS, 24)
    examples = encoder.examples(load_rows(str(questions), config.data))
    seen = {}
    inner = importance._gradients

    def spied(one: Base, micro: Any, side: str, precision: str, noise: int) -> Any:
        seen[side] = inner(one, micro, side, precision, noise)
        return dict(seen[side])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importance, "_gradients", spied)
        found = importance.scores(base, examples, sketch(base, 10_000), TrainConfig(batch_size=4), 0)
    square = [m for m, (d_out, d_in) in base.spec.modules.items() if d_out >= d_in]
    assert square
    for module in square:
        assert np.linalg.norm(seen["lora_B"][module]) == pytest.approx(np.linalg.norm(found[module]), rel=1e-4)


def test_a_gradient_that_is_not_finite_ends_it_with_empty_slots(llama: Path, notes: Path) -> None:
    base = loaded(llama)
    examples = examples_for(base, notes)
    with torch.no_grad():
        base.layer(next(iter(base.spec.modules))).base_layer.weight[0, 0] = float("nan")
    with pytest.raises(TrainingError, match=r"lora\.allocation"):
        importance.scores(base, examples, sketch(base, 4), TrainConfig(batch_size=4), 0)
    assert empty(base)


# Privacy --------------------------------------------------------------------------------------------------------------


def test_under_privacy_ranks_are_chosen_on_public_text_or_not_at_all(
    llama: Path, notes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = loaded(llama)
    config = small(llama, notes, *IMPORTANCE)
    config.privacy.mode = "example"

    class Untouchable(list[Example]):
        def __getitem__(self, index: Any) -> Any:
            raise AssertionError("private examples were looked at")

        def __iter__(self) -> Any:
            raise AssertionError("private examples were looked at")

    private = Untouchable(examples_for(base, notes))
    with pytest.raises(ConfigError, match=r"privacy\.mode=example.*expected lora\.public_data.*got none.*Set"):
        importance.chosen_ranks(config, base, private, 2, "0")
    config.lora.public_data = str(texts.write_jsonl(tmp_path / "public.jsonl", texts.notes()))
    chosen = importance.chosen_ranks(config, base, private, 2, "0")
    ranking.check(base.spec, chosen, 2, {}, "importance")
    config.privacy.mode = "none"
    assert importance.chosen_ranks(config, base, private, 2, "0") == chosen
    config.lora.public_data = str(tmp_path / "missing.jsonl")
    with pytest.raises(DataError):
        importance.chosen_ranks(config, base, private, 2, "0")


# A run ----------------------------------------------------------------------------------------------------------------


class Killed(Exception):
    """The process is gone."""


def interrupt(completed: Completed) -> None:
    if completed.state.round == 1:
        raise Killed


def adapter_files(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (path / "adapter").iterdir() if file.name != "README.md"}


def test_a_run_is_exact_says_its_ranks_and_is_resumed_with_the_same(llama: Path, notes: Path, tmp_path: Path) -> None:
    config = small(llama, notes, *IMPORTANCE, "clients.ranks=[4,2,2]", f"output={tmp_path / 'whole'}")
    watcher = Quiet()
    whole = simulate(config, watcher)
    assert whole.summary["aggregation"]["relative_error"] <= 1e-6
    summary = json.loads((tmp_path / "whole" / "summary.json").read_text())
    spec = prepare(config).base.spec
    assert list(summary["ranks"]) == ["0", "1", "2"]
    for client, rank in zip("012", (4, 2, 2)):
        ranking.check(spec, summary["ranks"][client], rank, {}, "importance")
        assert len(set(summary["ranks"][client].values())) > 1
    assert summary["ranks"]["1"] != summary["ranks"]["2"]
    assert sum("ranks by importance" in line for line in watcher.said) == 3
    path = tmp_path / "stopped"
    stopped = replace(config, output=str(path))
    with pytest.raises(Killed):
        simulate(stopped, Quiet(after=interrupt))
    resumed = simulate(replace(stopped, resume=str(path)), Quiet())
    assert resumed.summary["ranks"] == whole.summary["ranks"]
    assert adapter_files(path) == adapter_files(whole.path)


def test_uniform_ranks_are_not_listed(llama: Path, notes: Path, tmp_path: Path) -> None:
    finished = simulate(small(llama, notes, "rounds=1", f"output={tmp_path / 'run'}"), Quiet())
    assert "ranks" not in finished.summary
    assert finished.summary["client_ranks"] == {"0": 4, "1": 2, "2": 1}


def test_on_public_text_every_client_of_one_rank_chooses_on_that_alone(
    llama: Path, notes: Path, tmp_path: Path
) -> None:
    public = texts.write_jsonl(tmp_path / "public.jsonl", texts.notes())
    words = (*IMPORTANCE, "rounds=1", "clients.ranks=2", f"lora.public_data={public}")
    one = simulate(small(llama, notes, *words, f"output={tmp_path / 'one'}"), Quiet())
    other = simulate(small(llama, notes, *words, "partition=iid", f"output={tmp_path / 'other'}"), Quiet())
    assert one.summary["ranks"] == other.summary["ranks"]
    assert one.summary["ranks"]["0"] == one.summary["ranks"]["2"]


def test_a_run_whose_public_text_has_changed_is_not_resumed(llama: Path, notes: Path, tmp_path: Path) -> None:
    public = texts.write_jsonl(tmp_path / "public.jsonl", texts.notes())
    config = small(llama, notes, *IMPORTANCE, f"lora.public_data={public}", f"output={tmp_path / 'run'}")
    with pytest.raises(Killed):
        simulate(config, Quiet(after=interrupt))
    texts.write_jsonl(public, [{"text": "0123456789 " * 9}] * 40)
    with pytest.raises(CheckpointError, match="ranks by importance"):
        simulate(replace(config, resume=str(tmp_path / "run")), Quiet())
