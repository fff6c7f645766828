"""The number formats of a frozen base: what they are called, how the libraries load them, and on which device each trains.

A format says how the weights of the linear layers are held. Embeddings, norms and the output head stay in the compute format,
in which activations are, too. The adapter is float32 always.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lamina.client.hardware import Profile
from lamina.client.quantised.odd_rows import NF4_BLOCK
from lamina.protos.config import FORMATS
from lamina.protos.errors import ConfigError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# int8 and nf4 (4 bits with double quantisation) are bitsandbytes'; int8wo and fp8wo are torchao's, weights only. torchao's
# formats with dynamic activations are not offered: their gradients are wrong without an error.
BITSANDBYTES = ("int8", "nf4", "mixed")
TORCHAO = ("int8wo", "fp8wo")


@dataclass(frozen=True)
class Menu:
    """What a device can train with, the preferred first.

    Attributes:
        choices: (format of the linear layers, compute format).
        optimizers: In the order of preference.
    """

    choices: tuple[tuple[str, str], ...]
    optimizers: tuple[str, ...]


def menu(profile: Profile) -> Menu:
    """What trains on a device; what failed its self-test there is left out.

    Args:
        profile: The device.

    Returns:
        The choices. int8 comes last: it is larger than nf4 and no faster, and only wanted where 4 bits are not allowed.
    """
    optimizers: tuple[str, ...] = ("adamw",)
    if profile.kind == "cuda":
        capability = profile.capability or (0, 0)
        compute = "bf16" if capability >= (8, 0) else "fp32"
        choices = [(compute, compute)]
        if capability >= (6, 0):
            choices.append(("nf4", compute))
            optimizers = ("adamw", "paged_adamw8bit")
        if capability >= (7, 5):
            choices.append(("int8", compute))
    elif profile.kind in ("rocm", "xpu"):
        choices = [("bf16", "bf16"), ("nf4", "bf16"), ("int8", "bf16")]
        optimizers = ("adamw", "adamw8bit")
    elif profile.kind == "mps":
        choices = [("bf16", "bf16"), ("nf4", "bf16")]
    elif {"amx_bf16", "bf16"} & set(profile.features):
        choices = [("bf16", "bf16"), ("nf4", "bf16"), ("int8", "bf16")]
    else:
        # AVX512_BF16 without AMX multiplies bf16 at a fraction of the speed of fp32.
        choices = [("fp32", "fp32"), ("nf4", "fp32"), ("int8", "fp32")]
    return Menu(tuple(one for one in choices if one[0] not in profile.failed), optimizers)


def held(number_format: str, compute: str, shape: tuple[int, int]) -> str:
    """The format in which a matrix is really held.

    Args:
        number_format: Of the linear layers.
        compute: Of the activations.
        shape: (d_out, d_in).

    Returns:
        The compute format where nf4 cannot be: the numbers are no whole number of its blocks.
    """
    return compute if number_format == "nf4" and shape[0] * shape[1] % NF4_BLOCK else number_format


def default_compute(number_format: str, profile: Profile) -> str:
    """The compute format that goes with a format of weights on a device.

    Args:
        number_format: One of `FORMATS`.
        profile: The device.

    Returns:
        `fp32`, `bf16` or `fp16`.
    """
    if number_format in ("fp32", "bf16"):
        return number_format
    like = number_format if number_format in ("int8", "nf4") else "nf4"
    return next((compute for weights, compute in menu(profile).choices if weights == like), "fp32")


def compute_of(made_for: str, number_format: str, profile: Profile) -> str:
    """The compute format of a base where none was asked.

    Args:
        made_for: The compute format of a quantised copy, which may have been made for another device; empty for no copy.
        number_format: One of `FORMATS`.
        profile: The device.

    Returns:
        `fp32`, `bf16` or `fp16`; of a mixed copy what its matrices in 16 bits were made for.
    """
    if made_for and number_format == "mixed":
        return made_for
    return default_compute(number_format, profile)


def check(number_format: str, compute: str, where: str = "quantisation.format") -> None:
    """Raise unless a format is known and its library is here.

    Args:
        number_format: Of the weights.
        compute: Of the activations.
        where: For the message.

    Raises:
        ConfigError: If not.
    """
    if number_format not in FORMATS:
        raise ConfigError(f"{where}={number_format}: expected one of {', '.join(FORMATS)}.")
    if compute not in DTYPES:
        raise ConfigError(f"quantisation.compute={compute}: expected one of auto, {', '.join(DTYPES)}.")
    library = "bitsandbytes" if number_format in BITSANDBYTES else "torchao" if number_format in TORCHAO else ""
    if library:
        try:
            __import__(library)
        except ImportError:
            raise ConfigError(
                f"{where}={number_format}: expected {library} to be installed. Run `pip install {library}`, or take fp32 or bf16."
            ) from None


def transformers_config(number_format: str, compute: str, left_out: Sequence[str] = ()) -> Any:
    """What transformers is told so that it quantises on loading.

    Args:
        number_format: `int8`, `nf4`, `int8wo` or `fp8wo`.
        compute: Of the activations.
        left_out: Modules that stay in the compute format.

    Returns:
        A quantisation config of transformers, None for a format that needs none.
    """
    import transformers

    if number_format == "nf4":
        return transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=DTYPES[compute],
            llm_int8_skip_modules=list(left_out) or None,
        )
    if number_format == "int8":
        return transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=list(left_out) or None)
    if number_format == "int8wo":
        from torchao.quantization import Int8WeightOnlyConfig

        return transformers.TorchAoConfig(Int8WeightOnlyConfig())
    if number_format == "fp8wo":
        from torchao.quantization import Float8WeightOnlyConfig

        return transformers.TorchAoConfig(Float8WeightOnlyConfig())
    return None
