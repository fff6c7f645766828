"""Compensation of what quantisation loses: what it takes off, of matrices and of the loss, and how a client comes to have it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from lamina.__main__ import main
from lamina.client.data import Encoder, Example
from lamina.client.evaluate import score
from lamina.client.loading import BaseOptions, load_base
from lamina.client.making import Wanted, make
from lamina.client.model import Base
from lamina.client.quantised import selftest
from lamina.protos.config import DataConfig
from lamina.protos.errors import ConfigError
from lamina.simulations.corpora import stdlib_rows
from lamina.simulations.prepare import prepare
from tests.models import TINY
from tests.runs import config_of

pytestmark = pytest.mark.filterwarnings("ignore")

FORMATS = ("nf4", "int8", "mixed", "int8wo")


def base_in(number_format: str, rank: int = 0) -> Base:
    return load_base(BaseOptions(str(TINY), format=number_format, compute="fp32", compensation=rank))


def left(base: Base, exact: Base) -> dict[str, float]:
    """Module -> norm of what a base's weights are off, compensation included."""
    found = {}
    for module in exact.spec.modules:
        layer = base.layer(module).base_layer
        weights, extra = selftest.dequantised(layer), selftest.compensated(layer)
        weights = weights if extra is None else weights + extra
        found[module] = float((exact.layer(module).base_layer.weight - weights).double().norm())
    return found


@pytest.fixture(scope="module")
def exact() -> Base:
    return base_in("fp32")


@pytest.mark.parametrize("number_format", FORMATS)
def test_more_rank_leaves_less_of_every_matrix_and_full_rank_nothing(exact: Base, number_format: str) -> None:
    """Also where rows are no whole number of blocks: down_proj has 352 inputs."""
    before = left(base_in(number_format), exact)
    whole = dict(before)
    for rank in (1, 2, 4, 8, 16, 32, 64):
        now = left(base_in(number_format, rank), exact)
        for module in exact.spec.modules:
            assert now[module] < before[module], (module, rank)
        before = now
    for module, rest in left(base_in(number_format, 128), exact).items():
        assert rest < 1e-3 * whole[module], module
        assert rest < 1e-6 * float(exact.layer(module).base_layer.weight.norm()), module


def test_every_rank_leaves_the_tail_of_the_singular_values(exact: Base) -> None:
    plain = base_in("nf4")
    module = "model.layers.2.mlp.down_proj"
    weight = exact.layer(module).base_layer.weight.detach()
    values = torch.linalg.svdvals((weight - selftest.dequantised(plain.layer(module).base_layer)).double())
    for rank in (1, 8, 32):
        tail = float(values[rank:].square().sum().sqrt())
        assert left(base_in("nf4", rank), exact)[module] == pytest.approx(tail, rel=1e-4)


def held_out(base: Base) -> Sequence[Example]:
    """Pieces of the standard library, every 32nd of four packages."""
    rows = [row for row in stdlib_rows() if row["silo"] in ("email", "json", "asyncio", "unittest")]
    return Encoder(base.tokenizer, DataConfig(), "causal-lm", (), 128).examples(rows[::32])


def test_compensation_lowers_the_gap_of_the_loss_to_full_precision(exact: Base) -> None:
    text = held_out(exact)
    wanted = score(exact, text, 32)
    assert wanted.targets > 8000
    gaps = [abs(score(base_in("nf4", rank), text, 32).loss - wanted.loss) for rank in (0, 16, 64, 128)]
    assert gaps[0] > 0.01
    assert gaps[1] < 0.9 * gaps[0]
    assert gaps[2] < 0.5 * gaps[0]
    assert gaps[3] < 1e-4


# --- on loading ---


@pytest.mark.parametrize("number_format", ["nf4", "int8", "mixed"])
def test_a_base_compensated_on_loading_is_the_copy_that_was(tmp_path: Path, number_format: str) -> None:
    make(Wanted("tiny", tmp_path / "copy", number_format, "fp32", compensation=6), lambda text: None)
    direct, copy = base_in(number_format, 6), load_base(BaseOptions(str(tmp_path / "copy")))
    tokens = torch.arange(40).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(direct.model(input_ids=tokens).logits, copy.model(input_ids=tokens).logits)
    assert direct.spec.hashes == copy.spec.hashes
    assert not any("compensation" in name for name, _ in direct.model.named_parameters())
    assert selftest.check(direct, "x") < selftest.TOLERANCE[torch.float32]
    again = load_base(BaseOptions(str(tmp_path / "copy"), compensation=6))
    assert selftest.check(again, "x") < selftest.TOLERANCE[torch.float32]
    with pytest.raises(ConfigError, match=r"quantisation.compensation=8: expected 6, the rank of the copy"):
        load_base(BaseOptions(str(tmp_path / "copy"), compensation=8))


@pytest.mark.parametrize("number_format", ["fp32", "bf16"])
def test_what_is_not_quantised_is_not_compensated(number_format: str) -> None:
    compute = "bf16" if number_format == "bf16" else "fp32"
    base = load_base(BaseOptions(str(TINY), format=number_format, compute=compute, compensation=8))
    assert all(selftest.compensated(base.layer(m).base_layer) is None for m in base.spec.modules)


def test_factors_have_the_compute_format() -> None:
    base = load_base(BaseOptions(str(TINY), format="nf4", compute="bf16", compensation=8))
    layer = base.layer("model.layers.0.mlp.up_proj").base_layer
    (hook,) = [one for one in layer._forward_hooks.values() if getattr(one, "compensation", ())]
    assert [tuple(one.shape) for one in hook.compensation] == [(8, 128), (352, 8)]
    assert all(one.dtype == torch.bfloat16 for one in hook.compensation)


# --- in a run ---


def words(folder: Path, *more: str) -> list[str]:
    return [
        "clients.count=2", "clients.ranks=2", "rounds=1", "train.local_steps=2", "train.batch_size=2", "train.max_length=32",
        "evaluate.max_examples=4", "data.generate=0", "threads=1", "quantisation.compute=fp32", f"output={folder}", *more,
    ]  # fmt: skip


def test_clients_of_a_simulation_compensate_and_full_precision_does_not(tmp_path: Path) -> None:
    config = config_of(*words(tmp_path, "quantisation.format=[fp32,nf4]", "quantisation.compensation=4"))
    prepared = prepare(config)
    module = next(iter(prepared.base.spec.modules))
    assert selftest.compensated(prepared.bases["0"].layer(module).base_layer) is None
    beside = selftest.compensated(prepared.bases["1"].layer(module).base_layer)
    assert torch.linalg.matrix_rank(torch.as_tensor(beside)) == 4


def test_a_run_differs_by_its_compensation_and_sends_none_of_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found: dict[int, Mapping[str, Any]] = {}
    for rank in (0, 4):
        more = ("quantisation.format=nf4", f"quantisation.compensation={rank}")
        assert main(["simulate", *words(tmp_path / str(rank), *more)]) == 0
        capsys.readouterr()
        found[rank] = json.loads((tmp_path / str(rank) / "summary.json").read_text())
    assert found[0]["communication"] == found[4]["communication"]
    assert found[0]["eval"]["final_loss"] != found[4]["eval"]["final_loss"]
    assert main(["simulate", *words(tmp_path / "bad", "quantisation.compensation=-1")]) == 2
    assert "quantisation.compensation=-1: expected a number in [0" in capsys.readouterr().err


def test_a_plan_counts_compensation(capsys: pytest.CaptureFixture[str]) -> None:
    found = []
    for rank in (0, 16):
        assert main(["plan", "--what-if", "cpu:4GiB", "formats=nf4", f"compensation={rank}", "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out)["plan"])
    assert found[0]["terms"]["compensation"] == 0
    sides = sum(sum(shape) for shape in base_in("fp32").spec.modules.values())
    assert found[1]["terms"]["compensation"] == 4 * 16 * sides
    assert found[1]["peak_bytes"] > found[0]["peak_bytes"]
