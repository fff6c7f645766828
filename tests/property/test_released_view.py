"""What a client can rebuild of the others from what it receives, held against what its strategy declares."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given

from lamina.protos import compose
from lamina.protos.adapter import Adapter, LoraFactors, folded, product
from lamina.protos.blobs import blob
from lamina.protos.config import checked
from lamina.protos.errors import ConfigError
from lamina.protos.messages import Release, Update
from lamina.server import privacy
from lamina.server.releases import released, started
from lamina.strategies import STRATEGIES, Options, build
from tests.property.oracles import Federation, Matrix, federations, gap, play, strategy_of
from tests.property.test_linear import campaign_of, rounds_of

ONE_FACTOR = ("ffa", "alternate", "core")
# A rebuilt product is float32 factors, re-scaled once on their way.
SAME = 1e-4


def parts(release: Release) -> list[Adapter]:
    return [one for one in (release.trainable, release.frozen) if one is not None]


def blocks(factors: LoraFactors) -> list[LoraFactors]:
    """Every run of neighbouring slots, which is how concatenated updates lie in a release."""
    factors, rank = folded(factors), factors.rank
    return [
        LoraFactors(factors.A[first:last], factors.B[:, first:last], factors.scale)
        for first in range(rank)
        for last in range(first + 1, rank + 1)
    ]


def direction(factors: LoraFactors) -> Matrix:
    """The product, of norm 1."""
    found = product(factors)
    return found / max(float(np.linalg.norm(found)), 1e-30)


def rebuilt(release: Release, update: Update, weighted: bool = True) -> bool:
    """Whether some slots of the release are this update in every module that it has; `weighted`: but for a number."""
    for module, wanted in update.adapter.lora.items():
        seen = [block for part in parts(release) if module in part.lora for block in blocks(part.lora[module])]
        of = direction if weighted else product
        target = of(folded(wanted))
        if not any(gap(of(block), target) < SAME for block in seen if block.rank == wanted.rank):
            return False
    return bool(update.adapter.lora)


def seen_by(name: str, federation: Federation) -> tuple[Release, Sequence[Update]]:
    """What the first client receives after a round of everyone, and the others' updates."""
    me = federation.members[0]
    if name in ONE_FACTOR:
        campaign = campaign_of(name, federation)
        (played,) = rounds_of(campaign, federation, [federation.members])
        sent = released(campaign, blob, played.after, {me.client_id: me.budget(0)})
        release, updates = started(campaign, sent[me.client_id]), played.updates
    else:
        strategy = strategy_of(name, federation)
        (one,) = play(strategy, federation, [federation.members])
        release, updates = strategy.release(one.after, me.budget(0)), one.updates
    return release, [update for update in updates if update.client_id != me.client_id]


def view_of(name: str) -> str:
    return build(name, Options({"m": 2}, {"m": 2.0})).released_view


@pytest.mark.parametrize("name", [name for name in STRATEGIES if name != "fedavg"])
@given(federation=federations(least=4, most=5, modules=["q_proj", "down_proj"], everywhere=True))
def test_whoever_shows_single_updates_declares_it(name: str, federation: Federation) -> None:
    release, others = seen_by(name, federation)
    # Of rank 1, all cores differ by a number alone; no weight stands before them.
    found = [rebuilt(release, update, name not in ONE_FACTOR) for update in others]
    assert all(found) if view_of(name) == "all_raw" else not any(found)


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("mode", [["privacy=client-dp", "privacy.epsilon=8"], ["privacy.secagg=true"]])
def test_what_shows_single_updates_is_refused_where_they_are_to_be_hidden(name: str, mode: list[str]) -> None:
    strategy = build(name, Options({"m": 2}, {"m": 2.0}))

    def check() -> None:
        config = checked(compose.from_words([f"strategy={name}", *mode, "clients.ranks=2"]))
        privacy.check(config, strategy)

    if strategy.linear:
        check()
        return
    with pytest.raises(ConfigError, match="strategy"):
        check()


def test_a_stack_that_called_itself_an_aggregate_would_be_found() -> None:
    """The mistake, planted: the test above goes by what a release holds, not by the name of its strategy."""
    federation = federations(least=4, most=4, modules=["q_proj"], everywhere=True)

    @given(federation=federation)
    def found(federation: Federation) -> None:
        release, others = seen_by("stack", federation)
        assert all(rebuilt(release, update) for update in others)
        assert not rebuilt(Release(1, Adapter({})), others[0])
        noisy = {m: LoraFactors(f.A, f.B + np.float32(0.1), f.scale) for m, f in others[0].adapter.lora.items()}
        assert not rebuilt(release, Update("run", 1, "x", "", Adapter(noisy), 1))

    found()
