"""Figures of embeddings against a plain evaluation, and the limits of what a record takes."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeprune import tasks
from edgeprune.records import Candidate, EmbedFidelity
from edgeprune.tasks import CLASSIFY, Embed, neighbours, points_lost, typically_off

EMBED = Embed()
RANDOM = np.random.default_rng(0)
LABELS = RANDOM.integers(0, 4, 60).tolist()
DENSE = (RANDOM.standard_normal((4, 24))[LABELS] + 1.1 * RANDOM.standard_normal((60, 24))).astype(np.float32)
PRUNED = (3 * DENSE + 1.5 * RANDOM.standard_normal((60, 24))).astype(np.float32)


def cosine(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    return float(np.dot(a, b) / (np.linalg.norm(a) * np.linalg.norm(b)))


def nearest(rows: NDArray[np.float32], index: int) -> list[int]:
    """All other pictures, nearest first."""
    return sorted((i for i in range(len(rows)) if i != index), key=lambda i: -cosine(rows[i], rows[index]))


def voted(rows: NDArray[np.float32], index: int) -> int:
    """The class that the five nearest other pictures vote for."""
    votes = dict.fromkeys(range(4), 0.0)
    for other in nearest(rows, index)[:5]:
        votes[LABELS[other]] += np.exp(cosine(rows[other], rows[index]) / 0.07)
    return max(votes, key=lambda label: votes[label])


@pytest.mark.parametrize("at_once", [1 << 24, 100], ids=["at once", "in parts"])
def test_figures_of_embeddings_equal_a_plain_evaluation(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "AT_ONCE", at_once)
    pictures = range(len(DENSE))
    cosines = [cosine(DENSE[i], PRUNED[i]) for i in pictures]
    first = [nearest(DENSE, i)[0] == nearest(PRUNED, i)[0] for i in pictures]
    five = [len({*nearest(DENSE, i)[:5]} & {*nearest(PRUNED, i)[:5]}) / 5 for i in pictures]
    right = {name: [voted(rows, i) == LABELS[i] for i in pictures] for name, rows in (("d", DENSE), ("p", PRUNED))}
    found = EMBED.fidelity(DENSE, PRUNED, LABELS)
    assert isinstance(found, EmbedFidelity)
    assert found.cosine == pytest.approx(np.mean(cosines), abs=1e-6)
    assert found.cosine_p1 == pytest.approx(np.percentile(cosines, 1), abs=1e-6)
    assert found.neighbour_agreement == pytest.approx(100 * np.mean(first)) and 0 < np.mean(first) < 1
    assert found.recall5 == pytest.approx(100 * np.mean(five)) and found.recall5 != found.neighbour_agreement
    assert found.knn_top1 == pytest.approx(100 * np.mean(right["p"]))
    assert found.dense_knn_top1 == pytest.approx(100 * np.mean(right["d"])) != found.knn_top1
    assert points_lost(EMBED, DENSE, PRUNED, LABELS) == (found.dense_knn_top1 - found.knn_top1, "k-NN top-1")
    assert points_lost(EMBED, DENSE, PRUNED, None)[0] == pytest.approx(100 - 100 * np.mean(first))
    assert np.allclose(EMBED.losses(DENSE, PRUNED), 1 - np.array(cosines))
    assert EMBED.fidelity(None, PRUNED, LABELS) == EmbedFidelity(knn_top1=found.knn_top1)
    same = EMBED.fidelity(DENSE, 7 * DENSE, None)
    assert (same.cosine, same.agreement, same.top1) == (pytest.approx(1), 100, None), "only the direction counts"


def test_zero_shot_takes_the_nearest_text() -> None:
    texts = 5 * np.random.default_rng(1).standard_normal((4, 24)).astype(np.float32)
    texts[0] *= 9  # a long one is no nearer
    before, after = ([max(range(4), key=lambda c: cosine(row, texts[c])) for row in rows] for rows in (DENSE, PRUNED))
    found = Embed(texts).fidelity(DENSE, PRUNED, LABELS)
    assert found.zero_shot_agreement == pytest.approx(100 * np.mean(np.equal(before, after))) != 100
    assert found.zero_shot_top1 == pytest.approx(100 * np.mean(np.equal(after, LABELS)))
    assert found.dense_zero_shot_top1 == pytest.approx(100 * np.mean(np.equal(before, LABELS)))
    assert EMBED.fidelity(DENSE, PRUNED, LABELS).zero_shot_top1 is None


def test_embeddings_of_length_0_and_few_pictures() -> None:
    rows = DENSE[:3].copy()
    rows[1] = 0
    assert EMBED.losses(rows, rows).tolist() == pytest.approx([0, 1, 0])
    assert neighbours(rows)[0].shape == (3, 2)
    assert neighbours(np.ones((8, 2), np.float32))[0][3].tolist() == [0, 1, 2, 4, 5], "of equal ones the first"


def test_runtimes_may_differ_by_rounding_alone() -> None:
    """Relative to the length of the embedding, which differs by a factor of a hundred between models."""
    long = 100 * DENSE
    assert typically_off(EMBED, long * np.float32(1.0001), long) == pytest.approx(1e-4, rel=0.01)
    assert typically_off(CLASSIFY, long * np.float32(1.0001), long) > 1e-3
    assert np.isnan(typically_off(EMBED, np.full_like(DENSE, np.nan), DENSE))


def test_a_candidate_has_one_loss() -> None:
    assert Candidate((3,), 1.0, 0.25, 90.0, None).loss == 0.25
    assert Candidate((3,), 1.0, None, 90.0, None, 0.75).loss == 0.25
    for figures in ((None, 90.0, None, None), (0.1, 90.0, None, 0.9)):
        with pytest.raises(ValueError, match="a KL, a cosine or an error"):
            Candidate((3,), 1.0, *figures)
