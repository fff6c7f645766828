"""Bases that the benchmarks grow from the shipped one: the same function, larger."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from benchmarks.models import grown
from lamina.client.loading import BaseOptions, load_base
from lamina.client.model import quiet
from tests.models import TINY

pytestmark = pytest.mark.filterwarnings("ignore")


def logits(folder: Path) -> torch.Tensor:
    quiet()
    tokens = torch.tensor([[(7 * i * i + 3 * i) % 1024 for i in range(96)], list(range(100, 196))])
    with torch.no_grad():
        found: torch.Tensor = transformers.AutoModelForCausalLM.from_pretrained(folder)(input_ids=tokens).logits
    return found


@pytest.mark.parametrize(
    ("width", "depth", "noise"), [(1, 1, 0.0), (2, 1, 0.0), (3, 2, 0.0), (1, 3, 0.0), (4, 2, 0.0), (2, 2, 0.5)]
)
def test_a_grown_base_computes_what_the_shipped_one_does(tmp_path: Path, width: int, depth: int, noise: float) -> None:
    found = grown(tmp_path, width, depth, noise)
    assert float((logits(found) - logits(TINY)).abs().max()) < 1e-4


def test_a_grown_base_is_as_large_as_it_says_and_loads(tmp_path: Path) -> None:
    base = load_base(BaseOptions(str(grown(tmp_path, 4, 2)), format="nf4", compute="fp32"))
    assert base.model.config.hidden_size == 512
    assert base.model.config.num_hidden_layers == 8
    assert base.model.config.tie_word_embeddings
    plain = transformers.AutoModelForCausalLM.from_pretrained(grown(tmp_path, 4, 2))
    assert sum(p.numel() for p in plain.parameters()) == 24_125_952
    tokens = torch.arange(40).unsqueeze(0)
    with torch.no_grad():
        assert torch.isfinite(base.model(input_ids=tokens).logits).all()


def test_noise_leaves_no_copies_and_follows_its_seed(tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"

    def weight(noise: float, seed: int, folder: str) -> torch.Tensor:
        found = grown(tmp_path / folder, 2, 1, noise, seed)
        state = transformers.AutoModelForCausalLM.from_pretrained(found).state_dict()
        return state[name].clone()  # type: ignore[no-any-return]

    plain, one, same, other = weight(0, 0, "a"), weight(0.1, 0, "a"), weight(0.1, 0, "b"), weight(0.1, 1, "a")
    assert torch.equal(plain[:, :128], plain[:, 128:])
    assert not torch.equal(one[:, :128], one[:, 128:])
    assert not torch.equal(one[:352], one[352:])
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert float((one - plain).square().mean() / plain.square().mean()) ** 0.5 == pytest.approx(0.1, rel=0.02)
