"""Fixtures shared by all tests: very small bases with random weights, small data files, no network."""

from __future__ import annotations

import os

# Before torch is imported: one thread, so that sums have one order, and no hub.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from pathlib import Path

import pytest

from tests import models, texts


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A causal-lm with grouped-query attention, random weights, and the shipped tokenizer."""
    return models.save_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder saved without pooler and head."""
    return models.save_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="session")
def roberta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder whose classifier has a head of two layers, saved without."""
    return models.save_roberta(tmp_path_factory.mktemp("roberta"))


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A causal-lm whose linear layers keep their weights transposed."""
    return models.save_gpt2(tmp_path_factory.mktemp("gpt2"))


@pytest.fixture(scope="session")
def notes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A jsonl file of short texts in silos of unequal size."""
    return texts.write_jsonl(tmp_path_factory.mktemp("notes") / "notes.jsonl", texts.notes())


@pytest.fixture(scope="session")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A csv file of texts with one of three labels."""
    return texts.write_csv(tmp_path_factory.mktemp("questions") / "questions.csv", texts.questions())
