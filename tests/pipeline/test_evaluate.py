"""Is what was exported what PyTorch computes?"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from edgeprune.errors import ExportError
from edgeprune.pipeline.evaluate import PARITY_IMAGES, check_parity
from edgeprune.vit import fidelity


@pytest.mark.parametrize(
    ("wrong", "by", "refused"),
    [(1, 0.003, False), (PARITY_IMAGES, 2e-4, True), (PARITY_IMAGES, 5e-5, False), (1, np.nan, True)],
    ids=["a tie of scores", "another model", "rounding", "NaN"],
)
def test_parity_forgives_a_tie_and_nothing_else(
    wrong: int, by: float, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = np.random.default_rng(0).standard_normal((PARITY_IMAGES, 10)).astype(np.float32)
    monkeypatch.setattr(fidelity, "logits_of_schedule", lambda *_: wanted)
    found = wanted.copy()
    found[:wrong, 3] += by
    runtime = SimpleNamespace(parity=1e-4)
    job: Any = SimpleNamespace(model=None, pixels=np.zeros(PARITY_IMAGES), target=SimpleNamespace(runtime=runtime))
    schedule: Any = SimpleNamespace(method="pomt", tokens=(5, 3), prefix_last=False)
    if refused:
        with pytest.raises(ExportError, match="differ from PyTorch's"):
            check_parity(job, schedule, found)
    else:
        order = check_parity(job, schedule, found)
        assert sorted(order) == list(range(PARITY_IMAGES))
        assert wrong == PARITY_IMAGES or order[-1] == 0, "an image with a tie is the last to be kept as golden input"
