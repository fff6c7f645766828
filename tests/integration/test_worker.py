"""A site's worker: the base that it trains is the one that the run is about."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lamina.client.loading import BaseOptions, load_base
from lamina.client.policy import Policy
from lamina.client.worker import SiteWorker
from lamina.protos.errors import AdapterMismatch
from tests.deployment import config_of
from tests.models import TINY


def test_a_schema_that_does_not_name_the_sites_weights_is_refused() -> None:
    spec = load_base(BaseOptions(source=str(TINY), target_modules=["q_proj"], device="cpu")).spec
    worker = SiteWorker(config_of([f"model.source={TINY}"]), Policy(), lambda text: None)
    terms = {"task": {"task": "causal-lm", "lora.target_modules": ["q_proj"]}}
    for hashes in ({}, {"config": spec.hashes["config"]}, {**spec.hashes, "weights": "ab" * 32}):
        with pytest.raises(AdapterMismatch, match="expected the weights with SHA-256"):
            worker.begin(terms, replace(spec, hashes=hashes), {}, -1)
