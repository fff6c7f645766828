"""What tests of the audit share: small campaigns of its own, in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lamina.audits import scene
from lamina.audits.scene import Scene
from lamina.audits.settings import Settings
from lamina.protos.config import Config
from tests.runs import Quiet, config_of, merged

CAMPAIGN = (
    "partition.column=silo",
    "clients.count=2",
    "clients.ranks=4",
    "rounds=2",
    "train.local_steps=3",
    "train.batch_size=4",
    "train.max_length=16",
    "train.learning_rate=0.02",
    "evaluate.max_examples=4",
    "data.generate=0",
    "train.device=cpu",
)
PRIVATE = ("privacy=example-dp", "privacy.epsilon=8")


def small(llama: Path, notes: Path, *words: str) -> Config:
    """The smallest useful campaign; later words win."""
    return config_of(*merged([f"model={llama}", f"data={notes}", *CAMPAIGN], words))


def sizes(**more: Any) -> Settings:
    """An audit of the smallest sizes."""
    return Settings(**{"quick": True, "canaries": 24, "rows": 8, "guesses": 8, "examples": 12, "shadows": 2, **more})


def campaign(config: Config, folder: Path, **more: Any) -> Scene:
    """A campaign, run."""
    return scene.campaign(sizes(**more), config, folder, Quiet())
