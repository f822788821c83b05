"""The progress bar: what it counts, and how work inside other work is shown."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console
from rich.progress import Progress
from support.records import SETUP

from edgeprune.bundles.predict import ClassScore, Prediction, Predictions
from edgeprune.cli.output import ProgressBar, show
from edgeprune.cli.tables import doctor_table, run_table
from edgeprune.records import Latency


def bar() -> tuple[Progress, ProgressBar]:
    """A bar that draws into memory; its tasks are what is looked at."""
    rich = Progress(console=Console(file=io.StringIO(), force_terminal=True), auto_refresh=False)
    return rich, ProgressBar(rich)


def shown(rich: Progress) -> list[tuple[str, float]]:
    """Text and percentage of all visible tasks."""
    return [(task.description, task.percentage) for task in rich.tasks if task.visible]


def test_text_counts_what_is_being_done_and_percentage_what_is_done() -> None:
    rich, update = bar()
    update("measuring 14 token counts, round", 0, 4)
    assert shown(rich) == [("measuring 14 token counts, round 1 of 4", 0)]
    update("measuring 14 token counts, round", 3, 4)
    assert shown(rich) == [("measuring 14 token counts, round 4 of 4", 75)]
    update("measuring 14 token counts, round", 4, 4)
    assert shown(rich) == [("measuring 14 token counts, round 4 of 4", 100)]


def test_bytes_and_a_single_piece_of_work_are_not_counted() -> None:
    rich, update = bar()
    update("sending model.onnx", 50 << 20, 100 << 20)
    assert shown(rich) == [("sending model.onnx", 50)]
    update("exporting ONNX", 0, 1)
    assert shown(rich) == [("exporting ONNX", 0)]
    assert [task.total for task in rich.tasks if task.visible] == [None], "it pulses"
    update("exporting ONNX", 1, 1)
    assert shown(rich) == [("exporting ONNX", 100)]


def test_inner_work_takes_the_place_of_the_outer_which_then_continues() -> None:
    rich, update = bar()
    update("preparing 3 token counts", 0, 3)
    started = rich.tasks[0].start_time
    update("TensorRT: building", 1, 2)
    assert shown(rich) == [("TensorRT: building 2 of 2", 50)]
    update("preparing 3 token counts", 1, 3)
    assert shown(rich)[0][0] == "preparing 3 token counts 2 of 3"
    assert rich.tasks[0].start_time == started


def test_work_done_once_more_starts_its_clock_again() -> None:
    rich, update = bar()
    update("evaluating images", 0, 8)
    update("evaluating images", 8, 8)
    first = rich.tasks[0].id
    assert rich.tasks[0].finished
    update("evaluating images", 0, 8)
    assert len(rich.tasks) == 1 and not rich.tasks[0].finished and rich.tasks[0].id != first
    assert shown(rich) == [("evaluating images 1 of 8", 0)]


def test_what_is_in_brackets_may_change_while_the_clock_goes_on() -> None:
    rich, update = bar()
    update("recovering, step (held-out KL 0.4)", 0, 8)
    started = rich.tasks[0].start_time
    update("recovering, step (held-out KL 0.3)", 4, 8)
    assert shown(rich) == [("recovering, step 5 of 8 (held-out KL 0.3)", 50)]
    assert [task.start_time for task in rich.tasks] == [started]


def test_names_with_brackets_are_shown_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    """Labels and file names are no markup of rich."""
    top = (ClassScore(0, "[red]apple[/red] :cat:", 90.0), ClassScore(1, "[/]", 10.0))
    rows = (Prediction(Path("a[bold].jpg"), top),)
    show(run_table(Predictions(Path("b"), "[b]m", SETUP, rows, Latency(samples_ms=(1.0,)))), False)
    show(doctor_table([("[x]", "ok", "[y]")]), False)
    said = capsys.readouterr().out
    for text in ("[red]apple[/red] :cat: 90.0; [/] 10.0", "a[bold].jpg", "[b]m", "[x]", "[y]"):
        assert text in said, said
