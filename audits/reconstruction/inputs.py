"""The vectors that some adapted modules take in for a token, whatever text it stands in: those of the first block.

They are found by trying: the real base is run on one token among two different sets of others, and modules whose input does not
differ are kept. Where the base adds a vector for the position, a token has one input at each position.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lamina.client.model import Base, put
from lamina.protos.adapter import Adapter

Matrix = NDArray[np.float64]
_AT_A_TIME = 4096
_LENGTH = 6
_SAME = 1e-5


@dataclass(frozen=True, eq=False)
class Inputs:
    """Where the inputs of tokens are.

    Attributes:
        base: The base, whose slots are emptied to look.
        modules: Modules of the first block that take in one and the same vector.
        positions: At which a token's input differs; one where it does not.
    """

    base: Base
    modules: tuple[str, ...]
    positions: int

    def at(self, position: int) -> Iterator[Matrix]:
        """The inputs of all tokens at one position, some thousand tokens at a time.

        Args:
            position: From 0.

        Yields:
            (tokens, d_in), float64, in the order of token ids.
        """
        put(self.base, Adapter(), None, trainable=False)
        for first in range(0, self.base.vocab, _AT_A_TIME):
            ids = torch.arange(first, min(first + _AT_A_TIME, self.base.vocab), device=self.base.device).unsqueeze(1)
            where = torch.full_like(ids, position) if self.positions > 1 else None
            yield _captured(self.base, self.modules[:1], ids, where)[self.modules[0]][:, 0]


def token_inputs(base: Base, longest: int) -> Inputs | None:
    """Find the modules whose input depends on a token, and its position, alone.

    Args:
        base: The base.
        longest: Most tokens of an example.

    Returns:
        Where they are, or None where no adapted module has such an input.
    """
    put(base, Adapter(), None, trainable=False)
    rng = np.random.default_rng(0)
    one = rng.integers(0, base.vocab, _LENGTH)
    other = rng.integers(0, base.vocab, _LENGTH)
    place = _LENGTH // 2
    other[place] = one[place]
    apart = rng.integers(0, base.vocab, _LENGTH)
    apart[place + 1] = one[place]
    seen = _captured(
        base, tuple(base.spec.modules), torch.from_numpy(np.stack([one, other, apart])).to(base.device), None
    )
    alone = [module for module, x in seen.items() if _close(x[0, place], x[1, place])]
    if not alone:
        return None
    first = seen[alone[0]]
    shared = tuple(m for m in alone if seen[m].shape == first.shape and np.array_equal(seen[m], first))
    return Inputs(base, shared, 1 if _close(first[0, place], first[2, place + 1]) else longest)


def _close(x: Matrix, y: Matrix) -> bool:
    return bool(np.abs(x - y).max() <= _SAME * max(np.abs(x).max(), 1e-30))


class _Enough(Exception):
    """The module that was asked for has been reached."""


def _captured(
    base: Base, modules: Sequence[str], ids: torch.Tensor, positions: torch.Tensor | None
) -> dict[str, Matrix]:
    """What modules take in when the base reads some tokens; the run ends where one module alone is asked for and reached."""
    found: dict[str, Matrix] = {}

    def keep(module: str) -> Any:
        def hook(_: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            found[module] = inputs[0].detach().double().cpu().numpy()
            if len(modules) == 1:
                raise _Enough

        return hook

    hooks = [base.layer(module).register_forward_pre_hook(keep(module)) for module in modules]
    more = {} if positions is None else {"position_ids": positions}
    try:
        with torch.no_grad():
            base.model(input_ids=ids, attention_mask=torch.ones_like(ids), **more)
    except _Enough:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    return found
