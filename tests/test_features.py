"""Several outputs as one array, and the figures of dense features, against their definitions."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

from edgeprune.features import Dense, packed, unpacked
from edgeprune.records import Candidate, DenseFidelity, Output
from edgeprune.tasks import points_lost, typically_off

OUTPUTS = (Output("features_2", (2, 3, 4)), Output("features_10", (2, 3, 4)), Output("embedding", (5,)))
RANDOM = np.random.default_rng(0)
WHOLE = {o.name: RANDOM.standard_normal((40, *o.shape), dtype=np.float32) for o in OUTPUTS}
PRUNED = {n: a + 0.1 * RANDOM.standard_normal(a.shape, dtype=np.float32) for n, a in WHOLE.items()}


def length(array: np.ndarray) -> float:
    return float(np.linalg.norm(array.astype(np.float64)))


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    pairs = zip(a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1]), strict=True)
    return float(np.mean([np.dot(x, y) / np.linalg.norm(x) / np.linalg.norm(y) for x, y in pairs]))


def test_outputs_are_packed_in_one_order_whatever_that_of_the_file() -> None:
    array = packed(WHOLE)
    assert array.shape == (40, 24 + 24 + 5) and array.dtype == np.float32
    np.testing.assert_array_equal(packed(dict(reversed(WHOLE.items()))), array)
    np.testing.assert_array_equal(array[:, :24], WHOLE["features_2"].reshape(40, 24))  # 2 is before 10
    for name, found in unpacked(array, OUTPUTS).items():
        np.testing.assert_array_equal(found, WHOLE[name])
    alone = WHOLE["features_2"]
    assert packed({"y": alone}) is alone, "a single output keeps its shape"


def test_figures_of_features_are_their_definitions() -> None:
    found = Dense(OUTPUTS).fidelity(packed(WHOLE), packed(PRUNED), [0] * 40)
    for each, name in zip(found.layers, ("features_2", "features_10"), strict=True):
        assert each.layer == int(name[9:])
        assert each.error == pytest.approx(length(PRUNED[name] - WHOLE[name]) / length(WHOLE[name]), rel=1e-5)
        assert each.cosine == pytest.approx(cosine(WHOLE[name], PRUNED[name]), rel=1e-5)
    assert found.error == pytest.approx(np.mean([each.error**2 for each in found.layers]) ** 0.5)
    assert found.embedding_cosine == pytest.approx(cosine(WHOLE["embedding"], PRUNED["embedding"]), rel=1e-5)
    assert (found.head_error, found.head_difference, found.top1, found.kl) == (None,) * 4
    assert Dense(OUTPUTS).fidelity(None, packed(PRUNED), None) == DenseFidelity()
    losses = Dense(OUTPUTS).losses(packed(WHOLE), packed(PRUNED))
    assert losses.shape == (40,) and losses.mean() == pytest.approx(found.error**2), "the loss is the squared error"


def test_with_a_head_its_output_counts_and_that_of_the_unpruned_model_is_computed_once() -> None:
    calls = []

    def head(outputs: Mapping[str, np.ndarray]) -> np.ndarray:
        calls.append(len(outputs["features_10"]))
        return outputs["features_10"].sum(axis=3) * 2

    task, dense = Dense(OUTPUTS, head), packed(WHOLE)
    for _ in range(2):
        found, losses = task.fidelity(dense, packed(PRUNED), None), task.losses(dense, packed(PRUNED))
    assert calls == [40] * 5, "four times pruned, once unpruned"
    before, after = head(WHOLE), head(PRUNED)
    assert found.error == found.head_error == pytest.approx(length(after - before) / length(before), rel=1e-5)
    assert found.head_difference == pytest.approx(np.abs(after - before).mean(), rel=1e-5)
    assert losses.mean() == pytest.approx(found.error**2)
    assert points_lost(task, dense, packed(PRUNED), [0] * 40)[0] == pytest.approx(100 * (found.error or 0))


@pytest.mark.parametrize("name", [output.name for output in OUTPUTS])
def test_one_output_that_is_off_is_seen(name: str) -> None:
    task = Dense(OUTPUTS)
    assert typically_off(task, packed(WHOLE), packed(WHOLE)) == 0
    wrong = {**WHOLE, name: WHOLE[name] * 1.25}
    assert typically_off(task, packed(wrong), packed(WHOLE)) == pytest.approx(0.25, rel=1e-5)
    nan = {**WHOLE, name: WHOLE[name] * np.float32("nan")}
    assert not typically_off(task, packed(nan), packed(WHOLE)) <= 1


def test_records_of_dense_features() -> None:
    found = Candidate((5, 4), 1.0, None, None, None, None, 0.2)
    assert found.loss == pytest.approx(0.04) and found.accuracy == pytest.approx(80)
    assert Candidate((5, 4), 1.0, None, None, None, None, 1.5).accuracy == 0
    for wrong in ((0.1, 99.0, None, None, 0.2), (None, 99.0, None, None, 0.2), (None, None, None, 0.9, None)):
        with pytest.raises(ValueError, match="a candidate has a KL, a cosine or an error"):
            Candidate((5, 4), 1.0, *wrong)
