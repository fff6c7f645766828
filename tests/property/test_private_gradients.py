"""The gradient of every row by itself: against autograd on one row at a time, and against Opacus."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lamina.client.loading import BaseOptions, load_base
from lamina.client.losses import IGNORED, collate, losses, pad_id
from lamina.client.model import PREFIX, Base, set_checkpointing
from lamina.client.private import clipper, layers, selftest
from lamina.client.private.train import training_row_by_row
from lamina.protos.config import TrainConfig
from lamina.protos.errors import ConfigError, TrainingError
from tests.models import save_bert, save_gpt2, save_llama
from tests.private import alone, by_row, distance, filled, rows, share, watched

pytestmark = pytest.mark.filterwarnings("ignore")
LENGTHS = (9, 2, 14, 0, 5)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    save_llama(root / "llama"), save_gpt2(root / "gpt2"), save_bert(root / "bert")
    return root


@pytest.fixture(scope="module")
def base(folder: Path) -> Callable[..., Base]:
    made: dict[Any, Base] = {}

    def get(name: str, number_format: str = "fp32", compute: str = "fp32", **more: Any) -> Base:
        key = (name, number_format, compute, *sorted(more.items()))
        if key not in made:
            options = {"device": "cpu", "format": number_format, "compute": compute, **more}
            made[key] = load_base(BaseOptions(str(folder / name), **options))
        return made[key]

    return get


def gradient(parameter: nn.Parameter) -> torch.Tensor:
    """What autograd has found; it is taken away."""
    found, parameter.grad = parameter.grad, None
    assert found is not None
    return found


def classifier(base: Callable[..., Base], name: str) -> Base:
    return base(name, task="sequence-classification", labels=("a", "b", "c"))


def worst(base: Base, sides: str = "AB", also: tuple[str, ...] = ()) -> float:
    """The largest distance of a row's gradient from that of the row alone."""
    parameters, examples = filled(base, sides, also), rows(base, LENGTHS)
    found = by_row(base, parameters, examples)
    wanted = [alone(base, parameters, share(one)) for one in examples]
    assert all(any(one.any() for one in each.values()) for number, each in enumerate(wanted) if LENGTHS[number] > 1)
    return max(distance(ours, theirs) for ours, theirs in zip(found, wanted, strict=True))


@pytest.mark.parametrize("sides", ["AB", "A", "B", "core"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_factors(base: Callable[..., Base], name: str, sides: str) -> None:
    assert worst(base(name), sides) <= 1e-5


@pytest.mark.parametrize("number_format", ["fp32", "nf4"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_norms_as_a_run_trains_them(base: Callable[..., Base], name: str, number_format: str) -> None:
    assert worst(base(name, number_format, kind="norm")) <= 1e-5


@pytest.mark.parametrize("kind", ["norm", "head"])
def test_what_a_classifier_trains_whole(base: Callable[..., Base], kind: str) -> None:
    one = base("bert", task="sequence-classification", labels=("a", "b", "c"), kind=kind)
    assert worst(one) <= 1e-5


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_heads_with_input_of_two_and_three_dimensions(base: Callable[..., Base], name: str) -> None:
    one = classifier(base, name)
    assert one.spec.dense
    assert worst(one) <= 1e-5


@pytest.mark.parametrize(
    ("name", "also"),
    [
        ("llama", ("layernorm.weight", "norm.weight")),
        ("gpt2", ("ln_1.weight", "ln_1.bias", "ln_f.bias", "ln_2.weight")),
        ("bert", ("LayerNorm.weight", "LayerNorm.bias")),
    ],
)
def test_norms(base: Callable[..., Base], name: str, also: tuple[str, ...]) -> None:
    one = classifier(base, name) if name == "bert" else base(name)
    assert worst(one, also=also) <= 1e-5


@pytest.mark.parametrize("reentrant", [False, True])
def test_activations_that_are_computed_again(base: Callable[..., Base], reentrant: bool) -> None:
    one = base("llama")
    try:
        one.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        if reentrant:
            one.model.enable_input_require_grads()
        assert worst(one, also=("layernorm.weight",)) <= 1e-5
    finally:
        set_checkpointing(one, False)
        if reentrant:
            one.model.disable_input_require_grads()


@pytest.mark.parametrize("number_format", ["nf4", "int8", "mixed", "int8wo"])
def test_bases_in_fewer_bits(base: Callable[..., Base], number_format: str) -> None:
    assert worst(base("llama", number_format)) <= 1e-5


@pytest.mark.parametrize("number_format", ["bf16", "nf4", "int8"])
def test_activations_of_sixteen_bits(base: Callable[..., Base], number_format: str) -> None:
    """The same kernels, on the whole batch or on one row: rounding of a few parts in a thousand at most. A row in a batch and
    the row alone go through other kernels, which round otherwise.
    """
    one = base("llama", number_format, "bf16")
    parameters, examples = filled(one), [row for row in rows(one, LENGTHS) if row.targets.any()]
    for some in (examples, examples[:1], examples[2:3]):
        weights = [1.0 / int(row.targets.sum()) for row in some]
        added = {name: sum(each[name] for each in by_row(one, parameters, some)) for name in parameters}
        with training_row_by_row(one):
            losses(one, collate(some, pad_id(one), one.device, 0, weights))[0].backward()  # type: ignore[no-untyped-call]
        wanted = {name: gradient(parameter) for name, parameter in parameters.items()}
        assert distance(added, wanted) <= 5e-3  # type: ignore[arg-type]
    assert worst(one) <= 2e-2


def test_a_large_vocabulary(base: Callable[..., Base], monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits of a few tokens at a time, in which rows are mixed; the head is not trained, so no gradient is."""
    monkeypatch.setattr("lamina.client.losses.LOSS_CHUNK_BYTES", 0)
    one = base("llama")
    assert one.split_head
    assert worst(one) <= 1e-5


def test_sixteen_bit_norms_are_trained_in_thirty_two(base: Callable[..., Base]) -> None:
    one = classifier(lambda *words, **more: base(*words, "bf16", "bf16", **more), "bert")
    assert worst(one) <= 3e-2


class Small(nn.Module):
    """Of (rows, positions, 6): a shared layer used twice, a bias, both norms, a head on two dimensions."""

    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(6, 6), norm(6)
        self.again = nn.Linear(6, 6)
        self.again.weight = self.first.weight
        self.head = nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> Any:
        x = self.norm(self.first(x).tanh())
        x = self.again(self.first(x)) + x
        return self.head(x.mean(1)).square().sum(-1)


class GemmaRMSNorm(nn.Module):
    """Of Gemma's kind: one more than the weight says."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.randn(size) * 0.1), 1e-6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps)
        return (normed * (1 + self.weight.float())).type_as(x)


class OddRMSNorm(GemmaRMSNorm):
    """Of no kind that is known."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.weight.exp()


def check_small(model: nn.Module, x: torch.Tensor) -> None:
    parameters = {name: one for name, one in model.named_parameters() if one.requires_grad}
    before = dict(model.named_modules())
    with clipper.attached(model, parameters) as sheet:
        sheet.begin(len(x))
        model(x).sum().backward()
        clipper.check_unused(sheet)
    assert dict(model.named_modules()) == before
    assert not any("forward" in module.__dict__ for module in model.modules())
    for number, row in enumerate(x):
        wanted = torch.autograd.grad(model(row.unsqueeze(0)).sum(), list(parameters.values()))
        found = {name: sheet.blocks[one][number].view(one.shape) for name, one in parameters.items()}
        assert distance(found, dict(zip(parameters, wanted, strict=True))) <= 1e-5


@given(
    norm=st.sampled_from([nn.LayerNorm, nn.RMSNorm, GemmaRMSNorm]),
    count=st.integers(1, 5),
    positions=st.integers(1, 7),
    frozen=st.sets(
        st.sampled_from(["first.weight", "first.bias", "norm.weight", "norm.bias", "head.weight", "again.bias"])
    ),
)
def test_layers_of_every_kind(norm: Any, count: int, positions: int, frozen: set[str]) -> None:
    torch.manual_seed(count)
    model = Small(norm)
    for name, parameter in model.named_parameters():
        parameter.data.normal_()
        parameter.requires_grad_(name not in frozen)
    check_small(model, torch.randn(count, positions, 6))


def refused(model: nn.Module, match: str) -> None:
    with pytest.raises(ConfigError, match=match), clipper.attached(model, dict(model.named_parameters())):
        pass
    assert not any("forward" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize(
    "layer",
    [nn.Embedding(5, 6), nn.Conv1d(6, 6, 1), nn.Bilinear(6, 6, 6), OddRMSNorm(6), nn.BatchNorm1d(6), nn.PReLU()],
)
def test_what_is_not_covered_is_refused_by_name(layer: nn.Module) -> None:
    refused(
        nn.ModuleDict({"fine": nn.Linear(2, 2), "odd": layer}),
        r"odd\.\w+: expected a trained parameter of a linear layer",
    )


def test_dora_is_refused(folder: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "llama")
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
    trained = {name: one for name, one in model.named_parameters() if one.requires_grad}
    with pytest.raises(ConfigError, match="lora_magnitude_vector"), clipper.attached(model, trained):
        pass


def test_a_parameter_that_is_read_elsewhere_is_refused() -> None:
    class Penalised(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(2, 2))
    with clipper.attached(model, dict(model.named_parameters())) as sheet:
        sheet.begin(3)
        (model(torch.randn(3, 2)).sum() + model[0].weight.square().sum()).backward()  # type: ignore[operator]
        with pytest.raises(ConfigError, match=r"0\.weight: .* another part of the model reads it as well"):
            clipper.check_unused(sheet)
    refused(nn.Sequential(Penalised(2, 2)), r"0\.weight: expected a trained parameter of a linear layer")


def test_a_parameter_that_is_not_listed_is_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    listed = dict(itertools.islice(model.named_parameters(), 2))
    with pytest.raises(ConfigError, match=r"1\.weight"), clipper.attached(model, listed):
        pass


def test_a_tied_embedding_is_refused(base: Callable[..., Base]) -> None:
    one = copy.deepcopy(base("llama"))
    parameters = filled(one, also=("embed_tokens.weight",))
    with pytest.raises(ConfigError, match="embed_tokens"), watched(one, parameters):
        pass


def test_a_layer_that_sees_tokens_instead_of_rows_is_refused() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.expert = nn.Linear(6, 1)

        def forward(self, x: torch.Tensor) -> Any:
            return self.expert(x.flatten(0, 1)).view(len(x), -1).sum(1)

    model = Experts()
    with clipper.attached(model, dict(model.named_parameters())) as sheet:
        sheet.begin(3)
        with pytest.raises(ConfigError, match="expected the 3 rows of the batch in the first dimension"):
            model(torch.randn(3, 4, 6)).sum().backward()


def dropped(layer: Any) -> Callable[..., Any]:
    """A layer's forward with a mask that goes by place, as dropout's does."""

    def forward(x: torch.Tensor) -> Any:
        mask = torch.arange(x[..., 0].numel()).remainder(7).view(*x.shape[:-1], 1) > 0
        return type(layer).forward(layer, x * mask)

    return forward


def normed_over_rows(layer: Any) -> Callable[..., Any]:
    return lambda x: type(layer).forward(layer, x - x.mean(0, keepdim=True))


@pytest.mark.parametrize("broken", [dropped, normed_over_rows])
def test_planted_a_model_that_mixes_rows_fails_its_self_test(base: Callable[..., Base], broken: Any) -> None:
    one = copy.deepcopy(base("llama"))
    parameters = filled(one)
    assert selftest.check(one, parameters, TrainConfig(), "here") <= 1e-5
    assert not any(parameter.grad is not None for parameter in parameters.values())
    layer = one.model.get_submodule(PREFIX + "model.layers.0.mlp")
    layer.forward = broken(layer)
    with pytest.raises(TrainingError, match="here: expected the gradient of each row to depend on that row alone"):
        selftest.check(one, parameters, TrainConfig(), "here")


def test_planted_a_gradient_that_gets_lost_fails_the_self_test(
    base: Callable[..., Base], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = base("llama")
    parameters = filled(one)
    right = layers.Sheet.block
    monkeypatch.setattr(layers.Sheet, "block", lambda sheet, which, count: right(sheet, which, count).clone())
    with pytest.raises(TrainingError, match="expected the gradient of each row"):
        selftest.check(one, parameters, TrainConfig(), "here")


def test_the_self_test_tries_what_starts_at_zero_and_leaves_it_there(base: Callable[..., Base]) -> None:
    one = base("llama")
    parameters = filled(one)
    for name, parameter in parameters.items():
        if name.endswith("lora_B"):
            parameter.data.zero_()
    assert 0 < selftest.check(one, parameters, TrainConfig(), "here") <= 1e-5
    assert all(not one.any() for name, one in parameters.items() if name.endswith("lora_B"))


@pytest.mark.parametrize(
    ("name", "also"), [("llama", ("layernorm.weight",)), ("gpt2", ("ln_1.weight", "ln_1.bias")), ("bert", ())]
)
def test_opacus_finds_the_same(base: Callable[..., Base], name: str, also: tuple[str, ...]) -> None:
    from opacus import GradSampleModule

    one = copy.deepcopy(classifier(base, name) if name == "bert" else base(name))
    parameters, examples = filled(one, also=also), rows(one, (9, 4, 12, 7))
    ours = by_row(one, parameters, examples)
    weights = torch.tensor([1.0 / max(1, int(each.targets.sum())) for each in examples])
    batch = collate(examples, pad_id(one), one.device)
    module = GradSampleModule(one.model, loss_reduction="sum", strict=False)
    for each in one.model.modules():  # it looks only at layers that are in training; dropout is elsewhere, too
        each.training = isinstance(each, nn.Linear | nn.LayerNorm) or type(each).__name__.endswith("RMSNorm")
    logits = module(input_ids=batch.tokens, attention_mask=batch.mask).logits
    if name == "bert":
        nats = torch.nn.functional.cross_entropy(logits, batch.targets, reduction="sum")
    else:
        each = torch.nn.functional.cross_entropy(
            logits[:, :-1].transpose(1, 2), batch.targets[:, 1:], reduction="none", ignore_index=IGNORED
        )
        nats = (each.sum(1) * weights).sum()
    nats.backward()  # type: ignore[no-untyped-call]
    for number, found in enumerate(ours):
        theirs = {key: parameter.grad_sample[number] for key, parameter in parameters.items()}  # type: ignore[attr-defined]
        assert distance(found, theirs) <= 1e-5


def test_the_losses_are_those_of_training(base: Callable[..., Base]) -> None:
    """Without clipping and noise, rows of one length: the sum of row means is the batch's mean loss times its rows."""
    one = base("llama")
    examples = rows(one, (6, 6, 6))
    batch = collate(examples, pad_id(one), one.device)
    weighted = collate(examples, pad_id(one), one.device, 0, [1 / 5] * 3)
    with torch.no_grad():
        total, _, count = losses(one, batch)
        assert float(losses(one, weighted)[0]) == pytest.approx(3 * float(total) / count, rel=1e-6)
