"""The model of memory by hand, and what a machine says of itself."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from lamina.client.hardware import Profile, cgroup_cores, cgroup_memory, host_memory, num_bytes, profile, what_if
from lamina.client.losses import loss_chunk_tokens
from lamina.client.quantised.formats import default_compute, menu
from lamina.client.sizing import probed as probes
from lamina.client.sizing.memory import OBJECT_BYTES, Step, peak_bytes, terms
from lamina.client.sizing.planner import Wanted
from lamina.client.sizing.probe import Measured, Trial
from lamina.client.sizing.shape import shape_of
from lamina.protos.errors import ConfigError
from tests.models import TINY


def test_the_shape_of_the_small_base_is_that_of_its_weights() -> None:
    from safetensors import safe_open

    with safe_open(TINY / "model.safetensors", "np") as file:
        sizes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    count = sum(a * b for a, b in (one if len(one) == 2 else (one[0], 1) for one in sizes.values()))
    shape = shape_of("tiny")
    assert shape.parameters == count
    assert shape.gated
    assert {f"{name}.weight": list(sides) for name, sides in shape.linears.items()}.items() <= sizes.items()


def test_the_terms_of_a_step_by_hand() -> None:
    """One layer of q_proj alone, so that each term can be counted on paper."""
    from lamina.client.sizing.memory import Shape

    shape = Shape({"m.q_proj": (8, 4)}, 100, 4, 16, 1, 4, 4, 64)
    step = Step("fp32", "fp32", {"m.q_proj": 2}, tokens=10)
    found = terms(shape, step, 5)
    assert found["weights"] == 4 * (100 + 32)
    assert found["adapter, gradients and optimizer"] == 16 * 2 * (8 + 4)
    # Norms 8H, attention 4(2*4 + 2*4), feed-forward 4*3*16, the input of q_proj 4*4, rows of A 4*2.
    assert found["activations"] == 10 * (32 + 64 + 192 + 16 + 8)
    assert found["logits"] == 12 * 64 * 10
    # Of the feed-forward part 4*3*16, of the residual stream 4*2*4, a token: less than the logits.
    assert found["gradient of a layer, beyond the logits"] == 0
    # Two small factors, the largest small activation is 16 wide.
    assert found["scattered"] == 2 * 10 * 16 * 4
    assert found["runtime"] == 5 + OBJECT_BYTES
    assert peak_bytes(shape, step, 5) == max(sum(found.values()), found["weights"] + 5)
    by_row = terms(shape, replace(step, by_row=3), 5)  # of three examples, and their sum
    assert by_row == {**found, "gradients by row": 4 * 2 * (8 + 4) * 4}
    again = terms(shape, replace(step, checkpointing=True), 5)
    assert again["activations"] == 10 * 4 * 4
    few = terms(replace(shape, vocab=4), replace(step, default="nf4", checkpointing=True), 5)
    beyond = 10 * (32 + 64 + 192 + 16 + 8) + 10 * (192 + 32) + 4 * 32
    assert few["gradient of a layer, beyond the logits"] == beyond - 12 * 4 * 10


@pytest.mark.parametrize(
    ("train", "held", "moving"),
    # Of rank 2 and sides 8 and 4: 16 numbers in B, 8 in A, 4 in a core.
    [("AB", 24, 24), ("B", 24, 16), ("turns", 24, 16), ("core", 28, 4)],
)
def test_gradients_and_moments_are_of_what_is_trained(train: str, held: int, moving: int) -> None:
    from lamina.client.sizing.memory import Shape

    shape = Shape({"m.q_proj": (8, 4)}, 100, 4, 16, 1, 4, 4, 64)
    step = Step("fp32", "fp32", {"m.q_proj": 2}, tokens=10, train=train, dense=5)
    # A gradient and two moments of AdamW take 12 bytes, a number itself 4.
    assert terms(shape, step)["adapter, gradients and optimizer"] == 4 * (held + 5) + 12 * (moving + 5)


def test_norms_keep_what_their_scales_multiply() -> None:
    from lamina.client.sizing.memory import Shape

    shape = Shape({"m.q_proj": (8, 4)}, 100, 4, 16, 1, 4, 4, 64)
    norm, head = (terms(shape, Step("fp32", "fp32", {}, tokens=10, train=kind, dense=12)) for kind in ("norm", "head"))
    assert norm["adapter, gradients and optimizer"] == head["adapter, gradients and optimizer"] == 16 * 12
    assert head["activations"] == 10 * (32 + 64 + 192)
    assert norm["activations"] == head["activations"] + 10 * 32


def test_an_output_that_the_attention_keeps_is_counted_once_but_for_a_cast() -> None:
    from lamina.client.sizing.memory import Shape

    shape = Shape({"self_attn.o_proj": (4, 4), "mlp.down_proj": (4, 16)}, 0, 4, 16, 1, 4, 4, 64)
    for compute, inputs in (("fp32", 4 * 16), ("bf16", 4 * 4 + 4 * 16)):
        step = Step(compute, compute, {"self_attn.o_proj": 1, "mlp.down_proj": 1}, tokens=1)
        a = 4 if compute == "fp32" else 2
        assert terms(shape, step)["activations"] == 32 + a * 16 + a * 3 * 16 + inputs + 2 * 4


def test_formats_take_what_their_constants_say() -> None:
    from lamina.client.sizing.memory import Shape

    shape = Shape({"m.q_proj": (512, 1024)}, 0, 4, 16, 1, 4, 4, 64)
    weights = {name: terms(shape, Step(name, "fp32", {}, 1))["weights"] for name in ("fp32", "bf16", "int8", "nf4")}
    numbers = 512 * 1024
    assert weights["fp32"] == 4 * numbers
    assert weights["bf16"] == 2 * numbers
    assert weights["int8"] == numbers + 4 * 512
    # 4 bits, a byte for each 64 numbers, 4 bytes for each 256 of these.
    assert weights["nf4"] == numbers // 2 + numbers // 64 + 4 * numbers // 64 // 256


def test_logits_are_bounded_by_the_chunk() -> None:
    from lamina.client.sizing.memory import Shape

    shape = Shape({}, 0, 4, 16, 1, 4, 4, 128_000)
    assert loss_chunk_tokens(128_000) == 65
    few, many = (terms(shape, Step("fp32", "fp32", {}, tokens))["logits"] for tokens in (1000, 100_000))
    assert few == many == 12 * 128_000 * 65


def test_loading_from_a_larger_file_can_be_the_peak() -> None:
    from lamina.client.sizing.memory import Shape

    shape = Shape({"m.q_proj": (512, 1024)}, 0, 4, 16, 1, 4, 4, 64)
    step = Step("nf4", "fp32", {}, 1, file_bytes=10**9)
    assert peak_bytes(shape, step, 0) > 10**9


def test_sizes_as_people_write_them() -> None:
    assert num_bytes("24GiB", "x") == 24 * 2**30
    assert num_bytes("300 MB", "x") == 300 * 10**6
    assert num_bytes("1.5g", "x") == 3 * 2**29
    assert num_bytes("17", "x") == 17
    for wrong in ("", "GB", "-1GB", "1XB", "1e9"):
        with pytest.raises(ConfigError, match="expected a size"):
            num_bytes(wrong, "x")


def test_machines_that_are_not_here() -> None:
    assert what_if("cuda:24GiB").capability == (8, 0)
    assert what_if("cuda7.5:16GiB").capability == (7, 5)
    assert what_if("cpu:4GiB,cores=8") == Profile("cpu", "cpu:4GiB,cores=8", 2**32, 2**32, 8, None, ("avx2",))
    for wrong in ("cuda", "tpu:1GiB", "cpu8.0:1GiB", "cuda:", "cuda:1GiB,cores=x"):
        with pytest.raises(ConfigError, match="what-if"):
            what_if(wrong)


def test_what_each_device_trains_with() -> None:
    assert menu(what_if("cuda:1GiB")).choices[0] == ("bf16", "bf16")
    assert [one[0] for one in menu(what_if("cuda7.0:1GiB")).choices] == ["fp32", "nf4"]  # int8 wants 7.5
    assert menu(what_if("cuda5.0:1GiB")).choices == (("fp32", "fp32"),)
    assert menu(what_if("cpu:1GiB")).choices[0] == ("fp32", "fp32")
    assert all(compute != "fp16" for _, compute in menu(what_if("cpu:1GiB")).choices)
    assert "paged_adamw8bit" not in menu(what_if("rocm:1GiB")).optimizers
    assert default_compute("mixed", what_if("cuda:1GiB")) == "bf16"


def made(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


MEMINFO = {"proc/meminfo": "MemTotal: 16000000 kB\nMemFree: 1 kB\nMemAvailable: 8000000 kB\n"}


def test_a_control_group_of_version_2_bounds_what_is_free(tmp_path: Path) -> None:
    root = made(
        tmp_path,
        {
            **MEMINFO,
            "proc/self/cgroup": "0::/a/b\n",
            "sys/fs/cgroup/a/memory.max": "4000000000\n",
            "sys/fs/cgroup/a/memory.current": "3000000000\n",
            "sys/fs/cgroup/a/memory.stat": "anon 1\ninactive_file 1000000000\n",
            "sys/fs/cgroup/a/b/memory.max": "max\n",
            "sys/fs/cgroup/a/cpu.max": "150000 100000\n",
        },
    )
    assert host_memory(root) == (4_000_000_000, 2_000_000_000)
    assert cgroup_cores(root / "sys/fs/cgroup", root / "proc/self/cgroup") == 1.5


def test_a_control_group_of_version_1_too_and_none_at_all(tmp_path: Path) -> None:
    root = made(
        tmp_path,
        {
            **MEMINFO,
            "proc/self/cgroup": "5:cpu,cpuacct:/x\n4:memory:/x\n",
            "sys/fs/cgroup/memory/x/memory.limit_in_bytes": "1000000000",
            "sys/fs/cgroup/memory/x/memory.usage_in_bytes": "900000000",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": "5",
            "sys/fs/cgroup/cpu/x/cpu.cfs_quota_us": "50000",
            "sys/fs/cgroup/cpu/x/cpu.cfs_period_us": "100000",
        },
    )
    assert host_memory(root) == (1_000_000_000, 100_000_000)
    assert cgroup_cores(root / "sys/fs/cgroup", root / "proc/self/cgroup") == 0.5
    alone = made(tmp_path / "alone", MEMINFO)
    assert host_memory(alone) == (16_384_000_000, 8_192_000_000)
    assert cgroup_memory(alone / "sys/fs/cgroup", alone / "proc/self/cgroup") == []


def test_limits_of_the_process_bound_what_is_free(tmp_path: Path) -> None:
    lines = ["Limit                     Soft Limit           Hard Limit           Units"]
    lines += ["Max data size             3000000000           unlimited            bytes"]
    limits = "\n".join([*lines, "Max address space         unlimited            unlimited            bytes", ""])
    status = "Name: x\nVmSize: 4000000 kB\nVmData: 1000000 kB\n"
    root = made(tmp_path, {**MEMINFO, "proc/self/limits": limits, "proc/self/status": status})
    assert host_memory(root) == (3_000_000_000, 3_000_000_000 - 1_024_000_000)
    tight = limits.replace("space         unlimited ", "space         4100000000")
    root = made(tmp_path, {"proc/self/limits": tight})
    assert host_memory(root) == (3_000_000_000, 4_100_000_000 - 4_096_000_000)


def test_a_path_that_is_the_hosts_falls_back_to_the_mount(tmp_path: Path) -> None:
    """As in a container that sees its own group as the root."""
    root = made(
        tmp_path,
        {
            **MEMINFO,
            "proc/self/cgroup": "0::/docker/../../etc\n",
            "sys/fs/cgroup/memory.max": "2000000000",
            "sys/fs/cgroup/memory.current": "500000000",
        },
    )
    assert host_memory(root) == (2_000_000_000, 1_500_000_000)


def test_this_machine_has_a_profile() -> None:
    found = profile("cpu")
    assert found.kind == "cpu"
    assert 0 < found.free_bytes <= found.total_bytes
    assert 1 <= found.cores <= (os.cpu_count() or 1)


def test_a_probe_is_remembered_by_model_machine_and_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    machine = Profile("cpu", "one", 10**10, 10**10, 2, features=("avx2",))
    tried: list[Trial] = []

    def tries(trial: Trial) -> Measured | None:
        tried.append(trial)
        if trial.format == "int8":
            return None
        return Measured(90 * 10**6, 0.1 + 0.001 * trial.batch_size * trial.length, trial.batch_size * trial.length)

    monkeypatch.setattr(probes, "measure", tries)
    assert probes.remembered(machine, "tiny") == machine
    found = probes.probed(machine, "tiny", Wanted())
    assert found.speeds["fp32"].token_s == pytest.approx(0.001)
    assert found.speeds["fp32"].fixed_s == pytest.approx(0.1)
    assert found.failed == ("int8",)
    assert probes.remembered(machine, "tiny") == found
    assert probes.remembered(replace(machine, name="another"), "tiny").speeds == {}
    monkeypatch.setattr(probes, "_version", lambda name: "another")
    assert probes.remembered(machine, "tiny") == machine
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (kept,) = (tmp_path / "cache").rglob("*.json")
    good = json.loads(kept.read_text())
    for change in (
        {"speeds": 3}, {"speeds": {"fp32": {"fixed_s": "1", "token_s": 0.1}}}, {"overhead_bytes": {"fp32": -(10**12)}},
        {"speeds": {"fp32": {"fixed_s": -1.0, "token_s": 0.1}}}, {"overhead_bytes": {"fp32": float("inf")}},
        {"speeds": {"fp32": {"fixed_s": float("nan"), "token_s": 0.1}}}, {"failed": ["x"]}, {"failed": 3},
        {"overhead_bytes": {"evil": 1}},
    ):  # fmt: skip
        kept.write_text(json.dumps(good | change))
        assert probes.remembered(machine, "tiny") == machine
    kept.write_text("[" * 100_000)
    assert probes.remembered(machine, "tiny") == machine
