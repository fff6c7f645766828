"""Ranks by importance on paper."""

from __future__ import annotations

import numpy as np
import pytest

from lamina.client.sizing.importance import allocated, by_size, check_public
from lamina.protos.config import Config
from lamina.protos.errors import ConfigError
from lamina.protos.spec import AdapterSpec


def test_a_small_allocation_by_hand() -> None:
    spec = AdapterSpec({"q": (4, 4), "down": (4, 12)})
    found = {"q": np.array([6.0, 4.0, 1.0]), "down": np.array([5.0, 3.0, 2.0])}
    # Numbers to spend: 8 + 16. By number: q 36/8 and 16/8, then down 25/16, for which 8 are too few.
    assert allocated(spec, found, 1) == {"q": 2}
    assert allocated(spec, {**found, "q": np.array([6.0, 2.0])}, 1) == {"q": 1, "down": 1}
    assert allocated(spec, {**found, "q": np.array([6.0, 5.5, 5.0, 4.9])}, 1) == {"q": 3}
    # Times 16 and 48: the larger matrix comes first.
    sized = by_size(spec, found)
    assert sized["down"] == pytest.approx([240, 144, 96])
    assert sized["q"] == pytest.approx([96, 64, 16])
    assert allocated(spec, sized, 1) == {"down": 1}
    assert allocated(spec, sized, 1, {"down": 0}) == {"q": 1}


def test_a_privacy_mode_needs_public_data() -> None:
    config = Config()
    check_public(config)
    config.privacy.mode = "user"
    with pytest.raises(ConfigError, match="got none"):
        check_public(config)
    config.lora.public_data = "public.jsonl"
    check_public(config)
