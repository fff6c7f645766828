"""What is trained besides factors: norms and heads, whole, in every way to run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from lamina.client.commands.export import main as export_command
from lamina.client.loading import BaseOptions, load_base
from lamina.client.model import PREFIX, put, take, trainable_parameters
from lamina.protos import spec as specs
from lamina.protos.adapter import Adapter
from lamina.protos.codec import BYTES_PER_NUMBER, decode_update
from lamina.protos.config import Config
from lamina.protos.errors import ConfigError
from lamina.server.campaign import Campaign
from lamina.simulations import engine
from lamina.simulations.prepare import prepare
from lamina.strategies import STRATEGIES, Options, build
from tests import deployment
from tests.runs import Outcome, classification, config_of, go_on, play, same_bits, small

WIRES = ("fp32", "bf16", "fp16", "int8")
LLAMA_NORMS = {
    *(f"model.layers.{n}.{which}_layernorm.weight" for n in (0, 1) for which in ("input", "post_attention")),
    "model.norm.weight",
}
BERT_NORMS = {
    f"bert.{where}.LayerNorm.{what}"
    for where in ("embeddings", "encoder.layer.0.attention.output", "encoder.layer.0.output")
    for what in ("weight", "bias")
}
BERT_HEAD = {f"{layer}.{what}" for layer in ("bert.pooler.dense", "classifier") for what in ("weight", "bias")}


@pytest.fixture(params=["norm", "norm of a classifier", "head"])
def config(request: pytest.FixtureRequest, llama: Path, bert: Path, notes: Path, questions: Path) -> Config:
    kind = str(request.param).split()[0]
    if request.param == "norm":
        return small(llama, notes, "adapter.kind=norm")
    return classification(bert, questions, f"adapter.kind={kind}")


def named(config: Config) -> set[str]:
    if config.task == "causal-lm":
        return LLAMA_NORMS
    return BERT_HEAD if config.adapter.kind == "head" else BERT_NORMS | BERT_HEAD


def numbers(campaign: Campaign) -> int:
    return sum(value.size for value in campaign.spec.dense.values())


def test_these_train_and_nothing_else(config: Config) -> None:
    prepared = prepare(config)
    base = prepared.base
    before = {name: p.detach().clone() for name, p in base.model.named_parameters()}
    assert base.spec.modules == {}
    assert set(base.spec.dense) == named(config)
    outcome = play(config, prepared)
    assert outcome.state.adapter.lora == {}
    put(base, outcome.state.adapter, None)
    assert set(trainable_parameters(base)) == named(config)
    moved = {name for name, p in base.model.named_parameters() if not torch.equal(p, before[name])}
    # The bias of BERT's last norm and its pooler too: every one of them has a gradient.
    assert {name.removeprefix(PREFIX) for name in moved} == named(config)
    put(base, Adapter(), None, trainable=False)
    assert all(torch.equal(p, before[name]) for name, p in base.model.named_parameters())


def test_the_loss_falls(config: Config) -> None:
    config.train.local_steps = 8
    prepared = prepare(config)
    base = engine.evaluate(prepared, Adapter(), config, "base").loss
    outcome = play(config, prepared)
    assert engine.evaluate(prepared, outcome.state.adapter, config, "end").loss < base - 0.05


def assert_mean(outcome: Outcome) -> None:
    """G + sum p_k (W_k - T_k) of every parameter in float64, from what was sent."""
    before = outcome.campaign.spec.dense
    for done in outcome.rounds:
        for name, value in before.items():
            wanted = value.astype(np.float64)
            for update in done.updates:
                start = done.releases[update.client_id].trainable.dense[name]
                wanted = wanted + done.weights[update.client_id] * (
                    update.adapter.dense[name].astype(np.float64) - start
                )
            stored = done.state.adapter.dense[name]
            assert np.linalg.norm(stored - wanted) <= 1e-6 * np.linalg.norm(wanted)
        assert done.record["relative_error"] < 1e-6
        assert done.record["release_error"] == 0.0
        before = done.state.adapter.dense


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_takes_the_same_exact_mean(llama: Path, notes: Path, strategy: str) -> None:
    words = ["adapter.kind=norm", "rounds=3", "clients.join_round=[1,3,1]"]
    config = small(llama, notes, *words, f"strategy={strategy}")
    prepared = prepare(config)
    outcome = play(config, prepared)
    assert_mean(outcome)
    plain = play(small(llama, notes, *words), prepared)
    assert same_bits(outcome.state.adapter, plain.state.adapter)
    said = build(strategy, Options({}, {}))
    assert (said.exact, said.linear, said.equal_ranks, said.stable_coordinates) == (True, True, False, True)
    assert said.released_view == "aggregate"


@pytest.mark.parametrize("wire", WIRES)
def test_idle_rounds_change_no_bit_and_bytes_are_those_of_the_numbers(config: Config, wire: str) -> None:
    config.wire.format = wire
    active = play(config)
    idle = go_on(active, more=2, learning_rate=0.0)
    for adapter in idle.adapters:
        assert same_bits(adapter, active.state.adapter)
    width = 4 if wire == "int8" else BYTES_PER_NUMBER[wire]  # dense parameters travel in float32 under int8
    for _, reply in active.channel.replied:
        assert reply.update is not None
        payload = reply.update.read()
        header = 8 + int.from_bytes(payload[:8], "little")
        assert len(payload) - header == width * numbers(active.campaign)
        assert decode_update(payload).adapter.lora.keys() == set()


def test_kept_moments_are_of_any_strategy(llama: Path, notes: Path) -> None:
    words = ["adapter.kind=norm", "train.keep_optimizer=true", "train.schedule=constant"]
    outcome = play(small(llama, notes, *words))
    for state in outcome.cohort.states.values():
        assert {name.rsplit("/", 1)[0] for name in state.optimizer} == LLAMA_NORMS


def test_a_head_that_the_files_hold_is_trained_from_there(bert: Path, questions: Path, tmp_path: Path) -> None:
    import transformers

    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(bert, num_labels=3)
    model.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((bert / name).read_bytes())
    found = prepare(classification(tmp_path, questions, "adapter.kind=head")).base.spec.dense
    assert set(found) == {"classifier.weight", "classifier.bias"}
    assert np.array_equal(found["classifier.weight"], model.classifier.weight.detach().numpy())


@pytest.mark.parametrize(
    "words", [["nf4", "fp32"], ["nf4", "bf16"], ["int8", "bf16"], ["bf16", "bf16"], ["mixed", "bf16"]]
)
def test_norms_train_in_float32_on_a_coarser_base(llama: Path, notes: Path, words: list[str]) -> None:
    """Steps of 2e-4 would be rounded away beside a 1 in bf16, whose last bit there is 8e-3."""
    number_format, compute = words
    rest = ["adapter.kind=norm", "train.learning_rate=2e-4", "train.schedule=constant"]
    config = small(llama, notes, *rest, f"quantisation.format={number_format}", f"quantisation.compute={compute}")
    prepared = prepare(config)
    base = prepared.bases["0"]
    assert base.format == number_format
    outcome = play(config, prepared)
    put(base, outcome.state.adapter, None)
    assert all(p.dtype == torch.float32 for p in trainable_parameters(base).values())
    assert same_bits(take(base), outcome.state.adapter)
    for name, value in outcome.state.adapter.dense.items():
        change = np.abs(value - prepared.base.spec.dense[name])
        assert 0 < change.max() < 2e-3
        assert (change > 0).mean() > 0.9


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["adapter.kind=head"], "adapter.kind=head: expected task=sequence-classification"),
        (["adapter.kind=film"], "expected one of lora, norm, head"),
        (["adapter.kind=norm", "lora.allocation=importance"], "lora.allocation=importance: expected uniform"),
        (["adapter.kind=norm", "lora.rank_pattern={q_proj: 1}"], "lora.rank_pattern"),
    ],
)
def test_what_makes_no_sense_is_refused(words: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        config_of(*words)


def test_ranks_do_not_matter_where_there_are_none() -> None:
    made = config_of("adapter.kind=norm", "strategy=fedavg", "clients.count=2", "clients.ranks=[4,2]")
    assert made.adapter.kind == "norm"


def test_a_model_without_norms_or_a_head_is_refused(gpt2: Path) -> None:
    with pytest.raises(ConfigError, match="expected task=sequence-classification"):
        load_base(BaseOptions(str(gpt2), kind="head", device="cpu"))
    spec = load_base(BaseOptions(str(gpt2), kind="norm", device="cpu")).spec
    assert {name.rpartition(".")[2] for name in spec.dense} == {"weight", "bias"}
    assert len(spec.dense) == 2 * 5


def test_a_schema_is_written_for_a_kind(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "spec.json"
    assert export_command("spec", [str(llama), "kind=norm", f"output={out}", "--json"]) == 0
    found = specs.read(out)
    assert found.modules == {}
    assert set(found.dense) == LLAMA_NORMS
    with pytest.raises(ConfigError, match="expected one of lora, norm, head"):
        export_command("spec", [str(llama), "kind=film", f"output={out}"])


def schema_without_factors(folder: Path) -> Path:
    path = folder / "spec.json"
    path.write_text(deployment.spec({}).to_json())
    return path


@pytest.mark.parametrize("strategy", ["recompress", "alternate", "core"])
def test_a_deployment_gives_the_bits_of_a_run_in_memory(tmp_path: Path, strategy: str) -> None:
    spec_file = schema_without_factors(tmp_path)
    words = deployment.words(
        spec_file, f"strategy={strategy}", "insecure=true", "adapter.kind=norm", "keep_updates=true"
    )
    with deployment.coordinator(tmp_path / "run", words) as running:
        agents = [deployment.agent(name, running.port, tmp_path / name) for name in deployment.NAMES]
        sites = [deployment.in_thread(one) for one in agents]
        assert running.join() == 0
        for thread, outcome in sites:
            thread.join(20)
            assert outcome == [0]
    assert same_bits(deployment.final(running.path), deployment.fault_free(words, schema=deployment.spec({})))
    summary = json.loads((running.path / "summary.json").read_text())
    assert summary["client_ranks"] == dict.fromkeys(deployment.NAMES, 0)


def test_a_coordinator_refuses_a_schema_of_another_kind(tmp_path: Path) -> None:
    for kind, modules in (("lora", {}), ("norm", deployment.MODULES)):
        folder = tmp_path / kind
        folder.mkdir()
        (folder / "spec.json").write_text(deployment.spec(modules).to_json())
        words = deployment.words(folder / "spec.json", "insecure=true", f"adapter.kind={kind}")
        with (
            deployment.coordinator(folder / "run", words) as running,
            pytest.raises(ConfigError, match="was written for"),
        ):
            running.join()
