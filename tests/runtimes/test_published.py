"""The simulation against published latencies: those that fitted its constants, and those held out."""

from __future__ import annotations

import simulation
from support.paths import ROOT

ROWS = simulation.published()
# One engine for batch 1 to 64, launched kernel by kernel: about 5 µs per kernel more than in a CUDA graph.
WITHOUT_GRAPH = "bnabis93"


def test_simulated_is_within_a_quarter_of_published() -> None:
    far = [row for row in ROWS if abs(row.error) > 0.25]
    assert {(row.source, row.batch) for row in far} <= {(WITHOUT_GRAPH, 1)}, simulation.table(far)
    assert all(row.error < 0 for row in far)


def test_more_rows_are_held_out_than_fitted() -> None:
    fitted = [row for row in ROWS if row.fitted]
    held_out = [row for row in ROWS if not row.fitted and row.source != WITHOUT_GRAPH]
    assert len(fitted) == 4 and len(held_out) == 17
    assert sum(abs(row.error) for row in held_out) / len(held_out) < 0.12


def test_documented_table_is_that_of_the_script() -> None:
    assert simulation.table(ROWS) in (ROOT / "docs" / "benchmarks.md").read_text()
