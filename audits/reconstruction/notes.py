"""Invented clinical notes, of one form, in which a name, a diagnosis and a phone number belong together. Nobody is real."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

KINDS = ("diagnosis", "phone")
_FIRST = (
    "Ada", "Bert", "Clara", "Dora", "Emil", "Fritz", "Greta", "Hugo", "Ida", "Jonas", "Karla", "Ludwig",
    "Mina", "Nils", "Olga", "Paul", "Rosa", "Simon", "Thea", "Uwe", "Vera", "Wim", "Xenia", "Yara", "Zeno",
)  # fmt: skip
_LAST = (
    "Abel", "Brandt", "Conrad", "Dietz", "Ebner", "Falk", "Gruber", "Hansen", "Imhof", "Jansen", "Keller",
    "Lorenz", "Maier", "Neumann", "Otto", "Peters", "Quist", "Richter", "Schulz", "Thoma", "Ullrich", "Vogel",
    "Weber", "Zander",
)  # fmt: skip
_DIAGNOSES = (
    "asthma", "migraine", "anaemia", "gout", "sciatica", "psoriasis", "glaucoma", "epilepsy", "bronchitis",
    "tinnitus", "hepatitis", "pneumonia", "arthritis", "diabetes", "insomnia", "eczema", "angina", "vertigo",
    "malaria", "colitis", "rickets", "shingles", "scabies", "lupus", "anorexia", "tetanus", "cholera",
    "measles", "rubella", "mumps", "hernia", "obesity",
)  # fmt: skip


@dataclass(frozen=True)
class Note:
    """One note.

    Attributes:
        name: First and last.
        diagnosis: A word.
        phone: Six digits.
        date: Day and month.
    """

    name: str
    diagnosis: str
    phone: str
    date: str

    @property
    def text(self) -> str:
        """The note in full."""
        parts = [prompt(kind, self.name) + value(self, kind) + "." for kind in KINDS]
        return f"{self.name} was seen on {self.date}. " + " ".join(parts)


def prompt(kind: str, name: str) -> str:
    """What stands in a note before a value.

    Args:
        kind: One of `KINDS`.
        name: Whose.

    Returns:
        Text.
    """
    return f"The {kind} of {name} is"


def value(note: Note, kind: str) -> str:
    """A value as it stands in a note.

    Args:
        note: The note.
        kind: One of `KINDS`.

    Returns:
        Text that begins with a space.
    """
    return " " + (note.diagnosis if kind == "diagnosis" else note.phone)


def invented(count: int, apart: int, rng: np.random.Generator) -> tuple[list[Note], list[Note], list[Note]]:
    """Notes to keep, notes to publish, and values that are in neither.

    Args:
        count: Private notes, at most 8: their names, diagnoses and phones are in no other note.
        apart: Public notes, whose diagnoses repeat.
        rng: Draws them.

    Returns:
        Private notes; public notes; decoys, whose values no note has and are of the same form.
    """
    names = [f"{first} {last}" for first in _FIRST for last in _LAST]
    names = [names[int(index)] for index in rng.permutation(len(names))]
    words = [_DIAGNOSES[int(index)] for index in rng.permutation(len(_DIAGNOSES))]
    kept, shown, spare = words[:count], words[count : count + 8], words[count + 8 :]
    private = [_note(names.pop(), kept[number], rng) for number in range(count)]
    public = [_note(names.pop(), shown[int(rng.integers(len(shown)))], rng) for _ in range(apart)]
    decoys = [_note(names.pop(), word, rng) for word in spare]
    return private, public, decoys


def _note(name: str, diagnosis: str, rng: np.random.Generator) -> Note:
    phone = "".join(str(digit) for digit in rng.integers(0, 10, 6))
    return Note(name, diagnosis, phone, f"{int(rng.integers(1, 29))}.{int(rng.integers(1, 13))}.")


def values(notes: Sequence[Note], kind: str) -> list[str]:
    """The values of some notes.

    Args:
        notes: The notes.
        kind: One of `KINDS`.

    Returns:
        See `value`.
    """
    return [value(note, kind) for note in notes]
