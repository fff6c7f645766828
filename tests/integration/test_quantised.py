"""Bases in fewer bits: their gradients, their copies, and a run in which every client has another."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lamina.client.data import Example
from lamina.client.evaluate import score
from lamina.client.hardware import Profile
from lamina.client.loading import BaseOptions, load_base
from lamina.client.losses import Batch, losses, padded_length
from lamina.client.making import Wanted, make
from lamina.client.model import Base, put, training_mode
from lamina.client.quantised import compensation, copies, mixed, selftest
from lamina.protos.adapter import Adapter, LoraFactors
from lamina.protos.errors import ConfigError, TrainingError
from tests.models import TINY

pytestmark = pytest.mark.filterwarnings("ignore")

SMALL = ("nf4", "int8", "mixed", "int8wo")


def base_in(number_format: str, compute: str = "fp32", source: str = str(TINY), **more: Any) -> Base:
    return load_base(BaseOptions(source, format=number_format, compute=compute, **more))


@pytest.fixture(scope="module")
def bases() -> Mapping[str, Base]:
    return {name: base_in(name) for name in ("fp32", *SMALL)}


def batch(length: int = 24) -> Batch:
    tokens = torch.arange(3 * length).reshape(3, length) % 500
    mask = torch.ones_like(tokens)
    mask[1, length - 5 :] = 0
    targets = torch.where(mask.bool(), tokens, -100)
    return Batch(tokens, mask, targets)


def adapter(base: Base, rank: int = 3) -> Adapter:
    rng = np.random.default_rng(0)

    def drawn(*sides: int) -> Any:
        return rng.normal(0, 0.05, sides).astype(np.float32)

    return Adapter(
        {
            module: LoraFactors(drawn(rank, d_in), drawn(d_out, rank), 2.0)
            for module, (d_out, d_in) in base.spec.modules.items()
        }
    )


def gradients(base: Base) -> list[torch.Tensor]:
    put(base, adapter(base), None)
    with training_mode(base):
        total, _, count = losses(base, batch())
        (total / count).backward()  # type: ignore[no-untyped-call]
    return [p.grad.clone() for p in base.model.parameters() if p.grad is not None]


@pytest.mark.parametrize("number_format", SMALL)
def test_gradients_are_those_of_the_dequantised_base(bases: Mapping[str, Base], number_format: str) -> None:
    """The whole model: the same with its weights put back into a full-precision one."""
    base, plain = bases[number_format], base_in("fp32")
    for module in base.spec.modules:
        layer = base.layer(module).base_layer
        if selftest.is_quantised(layer):
            plain.layer(module).base_layer.weight.data.copy_(selftest.dequantised(layer))
    got, wanted = gradients(base), gradients(plain)
    assert len(got) == len(wanted) == 2 * len(base.spec.modules)
    for one, other in zip(got, wanted, strict=True):
        assert float((one - other).norm()) <= 1e-4 * float(other.norm())


@pytest.mark.parametrize("number_format", SMALL)
def test_training_is_the_same_after_an_evaluation(bases: Mapping[str, Base], number_format: str) -> None:
    """On some processors an evaluation packs nf4 weights for a kernel without a gradient."""
    base = bases[number_format]
    before = gradients(base)
    base.model.eval()
    with torch.no_grad():
        losses(base, batch())
    for one, other in zip(gradients(base), before, strict=True):
        assert torch.equal(one, other)
    assert selftest.check(base, "again") <= selftest.TOLERANCE[torch.float32]


def test_the_self_test_sees_a_layer_whose_gradient_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    base = base_in("nf4")
    layer = base.layer(next(iter(base.spec.modules))).base_layer
    forward = type(layer).forward
    monkeypatch.setattr(type(layer), "forward", lambda self, x: forward(self, x.detach()))
    with pytest.raises(TrainingError, match="self-test in the test"):
        selftest.check(base, "in the test")


def test_the_self_test_sees_weights_that_are_not_those_of_the_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    base = base_in("int8")
    exact = selftest.dequantised
    monkeypatch.setattr(selftest, "dequantised", lambda layer: 1.05 * exact(layer))
    with pytest.raises(TrainingError, match="within"):
        selftest.check(base, "in the test")


def test_the_self_test_leaves_the_slots_as_they_were(bases: Mapping[str, Base]) -> None:
    base = bases["nf4"]
    put(base, adapter(base), None)
    before = [p.detach().clone() for name, p in base.model.named_parameters() if "lora" in name]
    selftest.check(base, "x")
    after = [p for name, p in base.model.named_parameters() if "lora" in name]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert all(p.requires_grad and p.grad is None for p in after)


def test_every_format_has_the_hash_of_the_full_precision_base(bases: Mapping[str, Base]) -> None:
    hashes = [base.spec.hashes for base in bases.values()]
    assert all(one == hashes[0] for one in hashes)


def test_formats_lose_as_much_as_they_say(bases: Mapping[str, Base]) -> None:
    """Of a weight matrix; published for Gaussian weights: nf4 9 %, int8 below 1 %. Also where rows are no whole blocks."""
    for name, bound in (("nf4", 0.12), ("int8", 0.02), ("int8wo", 0.02)):
        worst = 0.0
        for module in bases["fp32"].spec.modules:
            exact = bases["fp32"].layer(module).base_layer.weight
            back = selftest.dequantised(bases[name].layer(module).base_layer)
            worst = max(worst, float((exact - back).norm() / exact.norm()))
        assert 0 < worst < bound, name


# --- copies ---


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    folder = tmp_path_factory.mktemp("copies")
    for name in ("nf4", "int8", "mixed", "bf16"):
        make(Wanted("tiny", folder / name, name, "fp32" if name != "bf16" else "bf16"), lambda text: None)
    return {name: folder / name for name in ("nf4", "int8", "mixed", "bf16")}


@pytest.mark.parametrize("number_format", ["nf4", "int8", "mixed", "bf16"])
def test_a_copy_is_the_base_in_that_format(made: Mapping[str, Path], number_format: str) -> None:
    copy = load_base(BaseOptions(str(made[number_format])))
    direct = base_in(number_format, "bf16" if number_format == "bf16" else "fp32")
    assert copy.format == number_format
    assert copy.spec.hashes == direct.spec.hashes
    assert copy.spec.modules == direct.spec.modules
    tokens = torch.arange(40).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(copy.model(input_ids=tokens).logits, direct.model(input_ids=tokens).logits)


def test_a_changed_copy_is_refused(made: Mapping[str, Path], tmp_path: Path) -> None:
    def changed(name: str) -> Path:
        folder = tmp_path / name
        shutil.copytree(made["nf4"], folder)
        return folder

    one = changed("bit")
    content = bytearray((one / "model.safetensors").read_bytes())
    content[-7] ^= 1
    (one / "model.safetensors").write_bytes(content)
    with pytest.raises(ConfigError, match="expected SHA-256"):
        load_base(BaseOptions(str(one)))
    one = changed("missing")
    (one / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"tokenizer"):
        load_base(BaseOptions(str(one)))
    one = changed("more")
    (one / "extra.py").write_text("")
    with pytest.raises(ConfigError, match="does not know"):
        load_base(BaseOptions(str(one)))
    one = changed("manifest")
    (one / copies.MANIFEST).write_text(json.dumps({"schema": 1}))
    with pytest.raises(ConfigError, match="expected a manifest"):
        load_base(BaseOptions(str(one)))
    good = json.loads((made["nf4"] / copies.MANIFEST).read_text())
    for change in (
        {"format": "evil"}, {"format": 5}, {"compute": "evil"}, {"formats": {"x": "evil"}}, {"compensation": -7},
        {"compensation": float("inf")}, {"compensation": 10**15}, {"compensation": True},
        {"base": {**good["base"], "weights": "x"}}, {"files": {"model.safetensors": "\x1b[31m"}}, {"base_model": 3},
    ):  # fmt: skip
        (one / copies.MANIFEST).write_text(json.dumps(good | change))
        with pytest.raises(ConfigError, match="expected a manifest"):
            load_base(BaseOptions(str(one)))
    (one / copies.MANIFEST).write_text("[" * 100_000)
    with pytest.raises(ConfigError, match="expected a manifest"):
        load_base(BaseOptions(str(one)))
    for lie in ("int8", "bf16", "fp32"):
        (one / copies.MANIFEST).write_text(json.dumps(good | {"format": lie}))
        with pytest.raises(ConfigError, match=f"expected files in {lie}"):
            load_base(BaseOptions(str(one)))


def test_a_copy_computes_as_the_device_does_not_as_its_maker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(Wanted("tiny", tmp_path / "copy", "nf4", "bf16"), lambda text: None)
    for features, dtype in ((("avx2",), torch.float32), (("avx2", "amx_bf16"), torch.bfloat16)):
        machine = Profile("cpu", "x", 10**10, 10**10, 1, features=features)
        monkeypatch.setattr("lamina.client.loading.profile", lambda device, machine=machine: machine)
        base = load_base(BaseOptions(str(tmp_path / "copy"), device="cpu"))
        assert base.dtype == dtype
        assert selftest.check(base, "here") < 4e-2


def test_batches_of_16_bits_on_a_processor_have_few_shapes() -> None:
    base = base_in("bf16", "bf16")
    lengths = {padded_length(base, length, 300) for length in range(1, 301)}
    assert lengths == {18, 37, 75, 150, 300}
    assert all(padded_length(base, length, 300) >= length for length in range(1, 301))
    assert padded_length(base_in("fp32", "fp32"), 77, 300) == 77
    rng = np.random.default_rng(0)
    examples = [Example(rng.integers(2, 1000, n).astype(np.int32), np.ones(n, bool)) for n in (9, 20, 33, 64)]
    exact = score(base, examples, 1)
    base.dtype = torch.float32  # so that nothing is padded
    assert score(base, examples, 1).nats == pytest.approx(exact.nats, rel=2e-3)


def test_a_copy_is_made_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("x")
    with pytest.raises(ConfigError, match="expected no such folder"):
        make(Wanted("tiny", tmp_path / "there"), lambda text: None)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(copies, "write_manifest", full)
    with pytest.raises(OSError, match="No space"):
        make(Wanted("tiny", tmp_path / "new"), lambda text: None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["there"]


def test_another_format_than_the_copys_is_refused(made: Mapping[str, Path]) -> None:
    with pytest.raises(ConfigError, match="the format of the copy"):
        load_base(BaseOptions(str(made["nf4"]), format="int8"))
    with pytest.raises(ConfigError, match="got a quantised copy"):
        make(Wanted(str(made["nf4"]), made["nf4"].parent / "again"), lambda text: None)


# --- compensation and mixed formats ---


def test_compensation_is_the_best_of_its_rank() -> None:
    """Eckart and Young: what it leaves is the tail of the singular values."""
    generator = torch.Generator().manual_seed(1)
    weight, lost = torch.randn(20, 30, generator=generator), torch.randn(20, 30, generator=generator)
    a, b = compensation.factors(weight, weight - lost, 5)
    assert (a.shape, b.shape) == ((5, 30), (20, 5))
    tail = torch.linalg.svdvals(lost.double())[5:].square().sum().sqrt()
    assert float((lost - b @ a).norm()) == pytest.approx(float(tail), rel=1e-5)


def test_compensation_brings_a_base_nearer_and_never_leaves(tmp_path: Path, bases: Mapping[str, Base]) -> None:
    make(Wanted("tiny", tmp_path / "plain", "nf4", "fp32"), lambda text: None)
    make(Wanted("tiny", tmp_path / "with", "nf4", "fp32", compensation=16), lambda text: None)
    plain, beside = (load_base(BaseOptions(str(tmp_path / name))) for name in ("plain", "with"))
    tokens = torch.arange(60).unsqueeze(0)
    with torch.no_grad():
        exact, one, other = (b.model(input_ids=tokens).logits for b in (bases["fp32"], plain, beside))
    assert float((other - exact).norm()) < 0.9 * float((one - exact).norm())
    assert beside.spec.modules == plain.spec.modules
    assert not any("compensation" in name for name, _ in beside.model.named_parameters())
    assert selftest.check(beside, "x") < selftest.TOLERANCE[torch.float32]


def test_mixed_spends_its_bits_where_they_help_most() -> None:
    """Against every assignment there is, on few matrices: the budget is kept, and what is lost is at most one upgrade more."""
    rng = np.random.default_rng(3)
    shapes = {f"m{i}": (64, 128 * (1 + i % 3)) for i in range(5)}
    errors = {
        module: {"nf4": (e := float(rng.uniform(1, 10))), "int8": e / rng.uniform(50, 200), "bf16": e / 1e4}
        for module in shapes
    }
    numbers = sum(a * b for a, b in shapes.values())
    for bits in (4.2, 5.0, 6.5, 9.0, 16.0):
        chosen = mixed.assignment(errors, shapes, bits)
        spent = sum(mixed.bits_of(chosen[m], shapes[m]) for m in shapes)
        assert spent <= bits * numbers + 1e-6
        best = min(
            sum(errors[m][f] for m, f in zip(shapes, option, strict=True))
            for option in itertools.product(mixed.CHOICES, repeat=len(shapes))
            if sum(mixed.bits_of(f, shapes[m]) for m, f in zip(shapes, option, strict=True)) <= bits * numbers
        )
        lost = sum(errors[m][chosen[m]] for m in shapes)
        assert lost <= best + max(one["nf4"] for one in errors.values())
    assert set(mixed.assignment(errors, shapes, 4.2).values()) == {"nf4"}
    assert set(mixed.assignment(errors, shapes, 16.0).values()) == {"bf16"}
    with pytest.raises(ConfigError, match=r"at least 4\.2"):
        mixed.assignment(errors, shapes, 4.1)


# --- frugal steps ---


def test_logits_in_pieces_give_the_same_loss_and_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    base = base_in("fp32")
    assert base.split_head
    whole = gradients(base)
    total, hits, count = losses(base, batch())
    monkeypatch.setattr("lamina.client.losses.loss_chunk_tokens", lambda vocab: 7)
    pieces = gradients(base)
    again, found, targets = losses(base, batch())
    assert (int(hits), count) == (int(found), targets)
    assert float(again) == pytest.approx(float(total), rel=1e-6)
    for one, other in zip(pieces, whole, strict=True):
        assert float((one - other).norm()) <= 1e-5 * float(other.norm())


@pytest.mark.parametrize("number_format", ["fp32", "nf4"])
def test_activations_that_are_computed_again_give_the_same_gradients(number_format: str) -> None:
    kept, again = base_in(number_format), base_in(number_format, checkpointing=True)
    wanted = gradients(kept)
    for one, other in zip(gradients(again), wanted, strict=True):
        assert float((one - other).norm()) <= 1e-5 * float(other.norm())


def test_layers_without_slots_pass_gradients_on_after_an_evaluation() -> None:
    base = base_in("nf4", target_modules=("q_proj",))
    before = gradients(base)
    with torch.no_grad():
        losses(base, batch())
    after = gradients(base)
    assert len(before) == 2 * len(base.spec.modules)
    for one, other in zip(before, after, strict=True):
        assert torch.equal(one, other)


def test_int8_in_training_multiplies_as_the_library_and_keeps_no_inputs() -> None:
    import gc
    import weakref

    import bitsandbytes as bnb
    from torch.utils.checkpoint import checkpoint

    from lamina.client.quantised import int8_layers

    torch.manual_seed(0)
    plain = torch.nn.Linear(96, 40)

    def layer() -> Any:
        made = bnb.nn.Linear8bitLt(96, 40, has_fp16_weights=False)
        made.load_state_dict(plain.state_dict())
        return made.to("cpu").train()

    library, ours = layer(), layer()
    int8_layers.mend(ours)
    found = []
    for one in (library, ours):
        x = torch.linspace(-1, 1, 5 * 96).reshape(1, 5, 96).requires_grad_()
        one(x).square().sum().backward()
        found.append((one(x), x.grad))
    for left, right in zip(*found, strict=True):
        assert left is not None
        assert right is not None
        assert torch.allclose(left, right, atol=1e-5)

    kept: list[weakref.ref[torch.Tensor]] = []

    def body(x: torch.Tensor) -> torch.Tensor:
        inner = x * 2
        if not kept:
            kept.append(weakref.ref(inner))
        result: torch.Tensor = ours(inner)
        return result

    result = checkpoint(body, torch.ones(1, 5, 96, requires_grad=True), use_reentrant=False)
    gc.collect()
    assert kept[0]() is None
    result.sum().backward()
