"""Which tokens were in a training batch, from the span of a change of LoRA factors (DAGER, Petrov et al. 2024,
arXiv:2405.15586, for low-rank updates of several optimizer steps).

The gradient of A is B' sum_t d_t x_t' over tokens t with inputs x_t, so the rows of A's change lie in the span of the inputs;
the gradient of B is sum_t d_t (A x_t)', so the rows of B's lie in the span of A x_t. In the first block x_t depends on the token
alone. Two things make the plain test (is x in the span?) useful for real runs:

- *Whitening.* Inputs of a trained base are far from isotropic: frequent tokens share directions that every change has, others are
  close to what is in any span. Inputs and changes are taken to coordinates in which the second moment over the vocabulary is 1.
- *Weights instead of a cut.* AdamW divides each number by its own size, which leaves the span, and a sum over many tokens fills
  all of it. Directions count by s^2 / (s^2 + c s_1^2), as a Wiener filter weighs signal against noise.

What A's and B's change say is of different steps (A does not move in the first, as B is 0 there), so both are asked, and their
scores, standardised over the vocabulary, are added. Where evidence is exact, the tokens that were there are many deviations
off, and the other kind adds little.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from lamina.audits.reconstruction.inputs import Inputs
from lamina.audits.views import Change, Seen

Matrix = NDArray[np.float64]
Scores = NDArray[np.float64]
# Singular values below a tenth of the largest count for less than half.
NOISE = 0.01
_RIDGE = 1e-3
_NOTHING = 1e-12


@dataclass(frozen=True, eq=False)
class Evidence:
    """A matrix whose rows are mixed from the inputs of tokens.

    Attributes:
        rows: (n, k).
        through: (k, d_in), what maps an input to where the rows are, or None where they are inputs' own mixtures.
    """

    rows: Matrix
    through: Matrix | None = None


def evidence(changes: Mapping[str, Change], modules: Sequence[str]) -> list[list[Evidence]]:
    """What a view says of the inputs of some modules that share them.

    Args:
        changes: Module -> what is seen.
        modules: Those that take in the inputs.

    Returns:
        Families, of one kind each: A's changes of all modules as one span, B's by module, and what is seen in part. None for what
        did not change.
    """
    there = [changes[module] for module in modules if module in changes]
    rows = [one.rows for one in there if one.rows is not None and one.known is None and _moved(one.rows)]
    families = [[Evidence(np.concatenate(rows))]] if rows else []
    partly = [_off_the_known(one.rows, one.known) for one in there if one.rows is not None and one.known is not None]
    columns = [
        Evidence(one.columns, one.start.A.astype(np.float64))
        for one in there
        if one.columns is not None and one.start is not None and _moved(one.columns)
    ]
    partly += [
        _off_the_known(np.linalg.qr(one.product[0], mode="r") @ one.product[1], one.known)
        for one in there
        if one.product is not None
    ]
    return families + [some for some in (columns, [one for one in partly if _moved(one.rows)]) if some]


def _moved(change: Matrix) -> bool:
    return bool(change.size) and float(np.abs(change).max()) > _NOTHING


def _off_the_known(rows: Matrix, known: Matrix | None) -> Evidence:
    """Rows without what lies in the span of others."""
    if known is None or not len(known):
        return Evidence(rows)
    _, sizes, directions = np.linalg.svd(np.asarray(known, np.float64))
    free = directions[int((sizes > 1e-6 * sizes[0]).sum()) :]
    return Evidence(rows @ free.T, free)


@dataclass(frozen=True, eq=False)
class Scored:
    """Scores of the vocabulary, and what the same attack makes of noise.

    Attributes:
        scores: (vocab,), higher is likelier.
        of_noise: The same from matrices of the same shapes that hold noise: what of a score is no evidence, such as that frequent
            tokens lie in directions of their own.
    """

    scores: Scores
    of_noise: tuple[Scores, ...]


def token_scores(seen: Seen, inputs: Inputs, rng: np.random.Generator, guesses: int = 4) -> Scored | None:
    """How likely each token of the vocabulary was in the batches that a view shows; of its positions the likeliest.

    Args:
        seen: What a party sees.
        inputs: Where the inputs of tokens are.
        rng: Of the noise.
        guesses: How often noise is scored.

    Returns:
        The scores; None where nothing of these modules changed.
    """
    families = evidence(seen.changes, inputs.modules)
    if not families:
        return None
    noise = [
        [[replace(one, rows=rng.normal(size=one.rows.shape)) for one in family] for family in families]
        for _ in range(guesses)
    ]
    found = [scores_of(some, inputs.at, inputs.positions) for some in (families, *noise)]
    return Scored(found[0], tuple(found[1:]))


def scores_of(
    families: Sequence[Sequence[Evidence]], inputs: Callable[[int], Iterator[Matrix]], positions: int = 1
) -> Scores:
    """See `token_scores`.

    Args:
        families: Evidence, at least one family; each family's scores are added up, then standardised.
        inputs: Position -> pieces (tokens, d_in) in the order of token ids.
        positions: How many there are.

    Returns:
        (vocab,), higher is likelier.
    """
    moment, count = np.zeros(()), 0
    for piece in inputs(0):
        moment, count = moment + piece.T @ piece, count + len(piece)
    filters = [[_filter(one, moment / count) for one in family] for family in families]
    best = np.full((len(families), count), -np.inf)
    for position in range(positions):
        first = 0
        for piece in inputs(position):
            there = slice(first, first + len(piece))
            for number, family in enumerate(filters):
                found = sum(np.asarray(score(piece)) for score in family)
                best[number, there] = np.maximum(best[number, there], found)
            first += len(piece)
    return np.sum([standard(one) for one in best], axis=0)  # type: ignore[no-any-return]


def _filter(one: Evidence, moment: Matrix) -> Callable[[Matrix], Scores]:
    """Inputs -> the weighted share of each that lies in the span of the evidence."""
    if one.through is not None:
        moment = one.through @ moment @ one.through.T
    sizes, axes = np.linalg.eigh(moment)
    whiten = axes / np.sqrt(np.maximum(sizes, 0.0) + _RIDGE * sizes.mean()) @ axes.T
    _, strengths, directions = np.linalg.svd(one.rows @ whiten, full_matrices=False)
    squares = strengths**2
    weighted = np.sqrt(squares / (squares + NOISE * squares[0]))[:, None] * directions
    through = one.through

    def score(x: Matrix) -> Scores:
        there = (x if through is None else x @ through.T) @ whiten
        norms = np.maximum(np.einsum("ij,ij->i", there, there), 1e-30)
        inside = there @ weighted.T
        return np.einsum("ij,ij->i", inside, inside) / norms  # type: ignore[no-any-return]

    return score


def standard(scores: Scores) -> Scores:
    """Scores of mean 0 and deviation 1, so that those of different kinds add up.

    Args:
        scores: Any.

    Returns:
        Of the same shape; 0 where all are equal.
    """
    return np.asarray((scores - scores.mean()) / max(float(scores.std()), 1e-12))


@dataclass(frozen=True)
class Recovery:
    """How well scores find the tokens that were there.

    Attributes:
        tokens: How many different ones there were, n.
        recall: Share of them among the n best scores.
        chance: That share where the attack is given noise; at least n over the vocabulary, what n guesses find.
        auc: Probability that a token that was there scores higher than one that was not; NaN where there is none of either.
        auc_chance: The same of noise; 0.5 where none was scored.
    """

    tokens: int
    recall: float
    chance: float
    auc: float
    auc_chance: float


def recovery(scored: Scored, truth: NDArray[np.int64]) -> Recovery:
    """Hold scores against the tokens that were there, whose number the evaluation alone knows.

    Args:
        scored: Scores, and scores of noise.
        truth: Ids, each once.

    Returns:
        The figures.
    """
    here = np.zeros(len(scored.scores), bool)
    here[truth] = True
    count = int(here.sum())
    if not count:
        return Recovery(0, 0.0, 0.0, float("nan"), float("nan"))
    each = (scored.scores, *scored.of_noise)
    recalls = [float(here[top(scores, count)].mean()) for scores in each]
    areas = [_area(scores, here) for scores in each]
    chance = max([count / len(here), *([float(np.mean(recalls[1:]))] if scored.of_noise else [])])
    return Recovery(count, recalls[0], chance, areas[0], float(np.mean(areas[1:])) if scored.of_noise else 0.5)


def _area(scores: Scores, here: NDArray[np.bool_]) -> float:
    """The area under the ROC curve, by ranks; equal scores share theirs."""
    count, others = int(here.sum()), int((~here).sum())
    _, places, sizes = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(sizes) - (sizes - 1) / 2)[places]
    return float((ranks[here].sum() - count * (count + 1) / 2) / (count * others)) if others else float("nan")


def top(scores: Scores, count: int) -> NDArray[np.int64]:
    """The tokens of the highest scores.

    Args:
        scores: (vocab,).
        count: How many.

    Returns:
        (count,) ids, best first.
    """
    return np.argsort(-scores, kind="stable")[:count].astype(np.int64)
