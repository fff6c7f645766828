"""Audit documents as an audit writes them: a private run that holds, an open one that leaks, and a claim that is broken."""

from __future__ import annotations

import copy
import math
from statistics import NormalDist
from typing import Any

Json = dict[str, Any]
_NORMAL = NormalDist()
_NEEDS = {
    "loss": "answers of the model",
    "calibrated": "answers of the model, the public base",
    "min-k++": "probabilities of all tokens",
    "rmia": "answers of the model, similar data",
    "lira": "answers of the model, similar data",
}
_SHIFTS = {"loss": 0.5, "calibrated": 1.0, "min-k++": 0.6, "rmia": 0.95, "lira": 1.05}
_NOTES = (
    (
        "Mrs Solveig Aas, born 12 May 1961, was admitted to Bergen on Monday with atrial fibrillation; phone 5550 1842.",
        "Solveig Aas, was admitted with fibrillation 5550 1842 born May Bergen the and on",
    ),
    (
        "Mr Johan Berg asks for a new appointment because of his knee. He cannot come before the 3rd of June.",
        "Johan Berg knee appointment June He cannot of a the his",
    ),
    (
        "Blood pressure 160/95, started on 5 mg amlodipine, control in four weeks at the surgery in Voss.",
        "160/95 amlodipine 5 mg Voss control weeks in the on at",
    ),
)


def _rates(mu: float, others: int) -> Json:
    rates: Json = {}
    for rate in (0.01, 0.001):
        found = _NORMAL.cdf(_NORMAL.inv_cdf(rate) + mu)
        span = [max(0.0, found - 0.03), min(1.0, found + 0.04)]
        rates[f"{rate:g}"] = {"value": found, "interval": span, "measurable": others >= 1 / rate}
    return rates


def attack(mu: float, needs: str, others: int = 400) -> Json:
    """An attack on scores that are normal and shifted by mu, as its theory has it."""
    grid = [n / others for n in range(1, others, max(1, others // 100))]
    curve = [[0.0, 0.0], *([x, round(_NORMAL.cdf(_NORMAL.inv_cdf(x) + mu), 4)] for x in grid), [1.0, 1.0]]
    auc = _NORMAL.cdf(mu / math.sqrt(2))
    return {
        "auc": auc,
        "auc_interval": [max(0.0, auc - 0.035), min(1.0, auc + 0.035)],
        "tpr_at_fpr": _rates(mu, others),
        "roc": curve,
        "members": others,
        "others": others,
        "needs": needs,
    }


def membership(strength: float, rows: bool = False) -> Json:
    attacks = {name: attack(strength * shift, _NEEDS[name]) for name, shift in _SHIFTS.items()}
    first = attacks["calibrated"]
    return {
        "attack": "calibrated",
        "of": "canaries",
        "auc": first["auc"],
        "auc_interval": first["auc_interval"],
        "tpr_at_fpr": {rate: one["value"] for rate, one in first["tpr_at_fpr"].items()},
        "members": 400,
        "others": 400,
        "attacks": attacks,
        "rows": {name: attack(0.5 * strength * _SHIFTS[name], _NEEDS[name], 90) for name in ("loss", "calibrated")}
        if rows
        else None,
    }


def party(recall: float, chance: float, individuals: bool = False, clients: int = 3, examples: int = 0) -> Json:
    return {
        "applicable": True,
        "why": "",
        "recall": recall,
        "chance": chance,
        "auc": min(0.99, 0.5 + (recall - chance) * 0.55),
        "rouge_l": chance * 0.6 + (recall - chance) * 0.5,
        "rouge_l_chance": chance * 0.6,
        "tokens": 118,
        "individuals": individuals,
        "clients": clients,
        "by_client": {f"clinic-{n}": {"recall": max(0.0, recall - 0.07 * n), "chance": chance} for n in range(clients)}
        if individuals
        else {},
        "examples": [
            {"client": f"clinic-{n}", "original": original, "recovered": recovered}
            for n, (original, recovered) in enumerate(_NOTES[:examples])
        ],
    }


def none_of(why: str) -> Json:
    keys = ("recall", "chance", "auc", "rouge_l", "rouge_l_chance", "tokens")
    return {
        "applicable": False,
        "why": why,
        **dict.fromkeys(keys),
        "individuals": False,
        "clients": 0,
        "by_client": {},
        "examples": [],
    }


def _checks(noise: bool) -> list[Json]:
    return [
        {
            "name": "noise",
            "holds": noise,
            "expected": "standard deviation 3.12 · C",
            "measured": "3.10 · C" if noise else "0.156 · C",
            "text": "" if noise else "20 times less noise than the ledger was charged for.",
        },
        {
            "name": "sensitivity",
            "holds": True,
            "expected": "at most C for one record",
            "measured": "1.000 · C",
            "text": "",
        },
        {"name": "independence", "holds": True, "expected": "correlation 0 ± 0.02", "measured": "0.003", "text": ""},
        {
            "name": "sampling",
            "holds": None,
            "expected": "Poisson with q = 0.05",
            "measured": "",
            "text": "The run keeps no batches.",
        },
        {"name": "accounting", "holds": True, "expected": "ε = 7.98", "measured": "ε = 7.98", "text": ""},
    ]


def private() -> Json:
    """example-dp at ε = 8 that holds."""
    return {
        "schema": 1,
        "lamina": "0.1.0",
        "made_at": "2026-03-01T12:00:00Z",
        "seconds": 171.3,
        "quick": False,
        "seed": 7,
        "subject": {
            "kind": "run",
            "run_id": "2026-03-01-recompress-8f2a",
            "strategy": "recompress",
            "rounds": 20,
            "clients": 3,
            "task": "causal-lm",
            "model": "tiny",
            "data": "clinics.jsonl",
            "hashes": {"config": "9f" * 32, "adapter": "3c" * 32, "base.weights": "71" * 32},
        },
        "claim": {
            "epsilon": 8.0,
            "delta": 1e-5,
            "unit": "record",
            "relation": "add-or-remove-one",
            "mode": "example-dp",
            "per_client": {"clinic-0": 7.98, "clinic-1": 7.4, "clinic-2": 5.1},
        },
        "mechanism": {
            "noise_multiplier": 0.82,
            "max_grad_norm": 1.0,
            "sample_rate": 0.05,
            "steps": 400,
            "accountant": "PLD, dp-accounting 0.6.0",
            "epsilon_recomputed": 7.98,
            "epsilon_by_round": [8 * math.sqrt(n / 20.1) for n in range(1, 21)],
            "epsilon_reported_by_round": [8 * math.sqrt(n / 20.1) for n in range(1, 21)],
            "budget": 8.0,
        },
        "checks": _checks(True),
        "membership": membership(0.25, rows=True),
        "exposure": {
            "candidates": 1024,
            "ceiling": 10.0,
            "canaries": {
                "rare": {"mean": 1.9, "max": 5.4, "extracted": 0, "count": 20, "chance": 1.44},
                "new-token": {"mean": 2.3, "max": 6.1, "extracted": 0, "count": 20, "chance": 1.44},
            },
        },
        "one_run": {
            "epsilon_lower": 0.26,
            "epsilon_lower_fdp": 0.39,
            "ceiling": 4.9,
            "ceiling_fdp": 10.4,
            "canaries": 800,
            "guesses": 400,
            "right": 219,
            "significance": 0.05,
            "delta": 1e-5,
        },
        "client_canaries": None,
        "reconstruction": {
            "peer": party(0.12, 0.115),
            "coordinator": party(0.13, 0.115, True, examples=2),
            "secagg-coordinator": none_of("recompress needs every update by itself, so no secure sum can carry it."),
            "outsider": party(0.116, 0.115),
            "malicious-coordinator": party(0.14, 0.115),
        },
        "extraction": {
            "prompts": 64,
            "prefix_tokens": 16,
            "verbatim": 0.0,
            "verbatim_base": 0.0,
            "verbatim_held_out": 0.0,
            "mean_match_tokens": 0.9,
            "mean_match_tokens_base": 0.8,
            "mean_match_tokens_held_out": 0.8,
            "examples": [],
        },
        "novelty": {
            "samples": [
                {"text": "The patient was seen in the surgery and", "score": 1.2, "overlap": 0.05, "longest": 4}
            ],
            "overlap_rate": 0.04,
            "base_overlap_rate": 0.03,
        },
        "defences": None,
        "verdict": "consistent",
        "reasons": [
            "The largest bound, ε ≥ 0.39, lies below the claim of 8.",
            "All checks of the mechanism that could be made hold.",
        ],
        "limits": ["Figures are of the tiny model; a larger one may remember more."],
        "signature": None,
    }


def leaking() -> Json:
    """`stack` without privacy: peers read single clients."""
    document = copy.deepcopy(private())
    document |= {
        "claim": None,
        "mechanism": None,
        "checks": [],
        "verdict": "no-claim",
        "membership": membership(2.6),
        "quick": True,
    }
    document["subject"] |= {"strategy": "stack", "rounds": 2, "run_id": "stack-open"}
    document["reasons"] = [
        "Other clients recover 91 % of a single client's tokens.",
        "Canaries are told apart with certainty.",
    ]
    document["one_run"] |= {"epsilon_lower": 4.9, "epsilon_lower_fdp": 10.4, "right": 400}
    document["exposure"]["canaries"]["rare"] |= {"mean": 9.1, "max": 10.0, "extracted": 14}
    document["exposure"]["canaries"]["new-token"] |= {"mean": 10.0, "max": 10.0, "extracted": 20}
    document["reconstruction"] = {
        "peer": party(0.91, 0.115, True, examples=3),
        "coordinator": party(0.98, 0.115, True, examples=3),
        "secagg-coordinator": none_of("stack sends every client's adapter to all, so there is no sum to hide behind."),
        "outsider": party(0.31, 0.115),
        "malicious-coordinator": party(0.99, 0.115, True, examples=1),
    }
    figures: Json = {"values": {"diagnosis": 0.75, "phone": 0.5}, "values_chance": {"diagnosis": 0.125, "phone": 0.02}}
    figures |= {
        "recall": 0.9,
        "pairs": {"diagnosis": 0.5},
        "pairs_chance": 0.0625,
        "pairs_untrained": {"diagnosis": 0.0},
    }
    honest = figures | {"values": {"diagnosis": 0.25, "phone": 0.1}, "pairs": {"diagnosis": 0.125}}
    document["reconstruction"]["malicious-coordinator"] |= {
        "why": "simulated on invented notes",
        "notes": {"tuned": figures, "honest": honest},
    }
    document["extraction"] |= {
        "verbatim": 0.31,
        "verbatim_base": 0.02,
        "verbatim_held_out": 0.01,
        "mean_match_tokens": 9.4,
        "mean_match_tokens_base": 1.1,
    }
    document["extraction"]["examples"] = [
        {
            "prefix": "Mrs Solveig Aas, born",
            "original": " 12 May 1961, was admitted to Bergen",
            "continued": " 12 May 1961, was admitted to Oslo on",
        }
    ]
    document["novelty"] = {
        "samples": [
            {
                "text": "admitted to Bergen on Monday with a cough",
                "variant": "static",
                "score": 4.2,
                "overlap": 0.75,
                "longest": 6,
                "shared": ["admitted to Bergen on Monday"],
            },
            {
                "text": "amlodipine, control in four weeks",
                "score": 3.9,
                "overlap": 1.0,
                "longest": 7,
                "shared": ["amlodipine, control in four weeks"],
            },
        ],
        "overlap_rate": 0.62,
        "base_overlap_rate": 0.03,
    }
    recall = {"peer": 0.91, "coordinator": 0.98, "outsider": 0.31, "secagg-coordinator": None}
    weak = {"peer": 0.14, "coordinator": 0.16, "outsider": 0.12, "secagg-coordinator": 0.13}
    chance = dict.fromkeys(recall, 0.115)
    document["defences"] = [
        _defence("none", "stack, no privacy", 3.62, None, 0.99, 0.84, recall, chance, 4.9),
        _defence(
            "recompress",
            "one aggregate instead of every adapter",
            3.63,
            None,
            0.98,
            0.8,
            recall | {"peer": 0.42},
            chance,
            4.8,
        ),
        _defence(
            "ffa",
            "A frozen; sums under secure aggregation",
            3.74,
            None,
            0.93,
            0.5,
            recall | {"peer": 0.2, "coordinator": 0.3, "secagg-coordinator": 0.22},
            chance,
            3.9,
        ),
        _defence("example-dp ε=8", "noise at each client", 3.98, 8.0, 0.58, 0.03, weak, chance, 0.3),
        _defence("example-dp ε=1", "noise at each client", 4.31, 1.0, 0.51, 0.01, weak, chance, 0.0),
    ]
    return document


def _defence(name: str, words: str, loss: float, epsilon: float | None, auc: float, rate: float, *more: Any) -> Json:
    recall, chance, lower = more
    figures = {"auc": auc, "tpr_at_fpr_0.01": rate, "recall": recall, "chance": chance, "epsilon_lower": lower}
    return {
        "name": name,
        "words": words,
        "seconds": 21.0,
        "base_loss": 4.42,
        "loss": loss,
        "epsilon": epsilon,
        **figures,
    }


def violated() -> Json:
    """client-dp at ε = 4 whose noise is 20 times too weak."""
    document = copy.deepcopy(private())
    document["claim"] |= {"epsilon": 4.0, "unit": "client", "mode": "client-dp", "per_client": {}}
    document["mechanism"] |= {
        "epsilon_recomputed": 81.3,
        "budget": 4.0,
        "epsilon_by_round": [0.4 + 0.2 * n for n in range(20)],
        "epsilon_reported_by_round": [0.2 + 0.19 * n for n in range(20)],
    }
    document |= {"checks": _checks(False), "verdict": "violated", "membership": membership(2.0), "defences": None}
    document["one_run"] |= {"epsilon_lower": 4.7, "epsilon_lower_fdp": 8.9, "right": 391}
    document["client_canaries"] = {
        "epsilon": 39.0,
        "interval": [33.5, 44.0],
        "analytic": 4.0,
        "canaries": 200,
        "clients": 20,
        "rounds": 20,
        "dimension": 20000,
    }
    document["reasons"] = ["ε ≥ 8.9 was measured where 4 is claimed.", "The noise is 20 times weaker than claimed."]
    return document
