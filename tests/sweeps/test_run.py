"""A sweep from the file to its tables: failures are rows, --resume goes on, a plan says what is reused."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.builds import CONTRACT, Shallow, Shared, call, few_digits

from edgeprune.bundles.format import MANIFEST
from edgeprune.cli.live import LiveRows
from edgeprune.errors import EngineError
from edgeprune.html_report.sweep_page import pareto_rows, sweep_html
from edgeprune.io import write_bytes
from edgeprune.pipeline.context import Options
from edgeprune.sweeps import run
from edgeprune.sweeps.plan import Job, jobs_of
from edgeprune.sweeps.run import InProcess, Outcome, finished, run_sweep
from edgeprune.sweeps.tables import csv_bytes, write_tables

TWO = """
models = ["vit_digits"]
devices = [{ name = "orin-nano", simulate = true, precisions = ["fp32", "fp16"] }]
goals = [{ speedup = 1.2 }, { speedup = 1.4 }]
"""
Builds = Callable[..., list[Path]]


@pytest.fixture
def jobs(tmp_path: Path) -> tuple[Job, ...]:
    (tmp_path / "s.toml").write_text(TWO)
    return jobs_of(tmp_path / "s.toml")


@pytest.fixture
def builds(shared: Shared, monkeypatch: pytest.MonkeyPatch) -> Builds:
    """builds(fails) replaces `build`: a copy of a bundle, or a failure; returns the list of what was built."""

    def replace(fails: Callable[[Options], bool] = lambda options: False) -> list[Path]:
        built: list[Path] = []

        def build(options: Options, progress: object) -> SimpleNamespace:
            assert options.out is not None
            if fails(options):
                raise EngineError("the engine\ncannot be built: update the driver")
            for path in shared.bundle.iterdir():
                write_bytes(options.out / path.name, path.read_bytes())
            built.append(options.out)
            return SimpleNamespace(path=options.out)

        monkeypatch.setattr(run, "build", build)
        return built

    return replace


def test_a_failure_is_a_row_and_resume_tries_it_again(jobs: tuple[Job, ...], builds: Builds, tmp_path: Path) -> None:
    built = builds(lambda options: options.precision == "fp16" and options.goal.speedup == 1.2)
    first = run_sweep(jobs, InProcess(), tmp_path / "work", tmp_path / "out")
    assert [outcome.job for outcome in first] == list(jobs) and len(built) == 3
    [failed] = [outcome for outcome in first if outcome.error]
    assert failed.error == "the engine cannot be built: update the driver"
    assert len(finished(jobs, tmp_path / "out")) == 3

    built = builds()
    again = run_sweep(jobs, InProcess(), tmp_path / "work", tmp_path / "out", resume=True)
    assert built == [tmp_path / "out" / failed.job.name], "only what had failed is built"
    assert all(outcome.error is None for outcome in again)


def test_results_are_found_from_any_folder(
    jobs: tuple[Job, ...], builds: Builds, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And where the whole folder was moved."""
    builds()
    monkeypatch.chdir(tmp_path)
    run_sweep(jobs, InProcess(), Path("work"), Path("out"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    (tmp_path / "out").rename(tmp_path / "moved")
    assert len(finished(jobs, tmp_path / "moved")) == 4


def test_a_result_of_other_inputs_is_not_reused(jobs: tuple[Job, ...], builds: Builds, tmp_path: Path) -> None:
    built, out = builds(), tmp_path / "out"
    run_sweep(jobs, InProcess(), tmp_path / "work", out)
    assert len(finished(jobs, out)) == 4
    (built[0] / MANIFEST).write_bytes((built[0] / MANIFEST).read_bytes() + b" ")
    assert len(finished(jobs, out)) == 3, "its bundle has changed"
    images = few_digits(tmp_path / "digits")
    (tmp_path / "s.toml").write_text(f'images = "{images}"\n{TWO}')
    assert not finished(jobs_of(tmp_path / "s.toml"), out), "other pictures"


def test_too_many_failures_stop_it(jobs: tuple[Job, ...], builds: Builds, tmp_path: Path) -> None:
    builds(lambda options: True)
    outcomes = run_sweep(jobs, InProcess(), tmp_path / "work", tmp_path / "out", max_failures=1)
    assert [str(outcome.error).partition(":")[0] for outcome in outcomes] == [
        *["the engine cannot be built"] * 2, *["not run after 2 failures"] * 2,
    ]  # fmt: skip


def test_a_defect_does_not_end_the_others(
    jobs: tuple[Job, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "build", lambda options, progress: [][0])
    errors = {str(outcome.error) for outcome in run_sweep(jobs, InProcess(), tmp_path, tmp_path / "out")}
    assert len(errors) == 1 and errors.pop().startswith("IndexError: list index out of range: please report")


def test_live_rows(jobs: tuple[Job, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    rows, now = LiveRows(jobs, lines=False), 100.0
    monkeypatch.setattr("edgeprune.cli.live.time", SimpleNamespace(monotonic=lambda: now))
    rows.watch(jobs[0], "exporting")
    assert rows.whole_left_s() is None, "nothing has ended, so nothing is known"
    now = 110.0
    rows.ended(Outcome(job=jobs[0], bundle="b"))
    rows.watch(jobs[1], "exporting")
    now = 114.0
    assert rows.left_s(jobs[1]) == pytest.approx(6)
    assert rows.whole_left_s() == pytest.approx(6 + 2 * 10)


def test_front() -> None:
    def row(ms: float, top1: float, batch: int = 1) -> dict[str, object]:
        return {"latency_ms": {"median": ms}, "batch": batch, "top1": top1}

    fast, better, beaten, batched = row(1, 80), row(2, 90), row(3, 85), row(6, 95, 4)
    assert pareto_rows([beaten, better, batched, fast], "top1") == [fast, batched]


def page_row(label: str, ms: float, **figures: object) -> dict[str, object]:
    row: dict[str, object] = {"label": label, "model": "vit", "device": "cpu", "job": f"{label} {ms}", "error": None}
    row |= {"goal": "fast", "method": "fold", "policy": "search", "precision": "fp32", "batch": 1, "speedup": 2.0}
    row |= {"latency_ms": {"median": ms}, "dense_latency_ms": {"median": 2.0}, "images": 32, "held_out": True}
    return row | dict.fromkeys(("top1", "dense_top1", "agreement", "kl")) | figures


def test_page_of_dense_features_and_of_one_model_with_several_weights() -> None:
    dense = [
        page_row("d", ms, fidelity={"task": "dense", "error": error, "embedding_cosine": 0.99})
        for ms, error in ((1.0, 0.2), (1.5, 0.1), (1.6, 0.3))
    ]
    assert pareto_rows(dense, "error") == dense[:2], "less is better"
    figures = {"top1": 80.0, "dense_top1": 81.0, "agreement": 90.0, "kl": 0.1, "fidelity": {"task": "classify"}}
    page = sweep_html("s", [*dense, page_row("vit-a", 1.0, **figures), page_row("vit-b", 1.0, **figures)])
    assert page.count("<svg") == 3 and page.startswith("<!DOCTYPE") and "3 models on 1 device" in page
    assert all(f"<h2>{label} on cpu</h2>" in page for label in ("d", "vit-a", "vit-b"))
    assert "relative error</th>" in page and "<td>0.1000</td>" in page and page.count("top-1, %</th>") == 2
    assert "1.000 ms, 0.2000" in page and "unpruned: 2.000 ms, 0.0000" in page, "the chart has them"


def test_command(shallow: Shallow, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A real sweep of a small model: one goal is met, one is out of reach."""
    few_digits(tmp_path / "digits")
    (tmp_path / "small.toml").write_text(
        f'models = ["{shallow.model}"]\nimages = "digits/labels.csv"\nmethods = ["topk"]\n'
        "goals = [{ speedup = 1.05 }, { speedup = 50 }]\nsearch_images = 4\nneighbours = 0\n"
        'devices = [{ name = "orin-nano", simulate = true }]\n'
    )
    out = tmp_path / "out"
    command = ("sweep", tmp_path / "small.toml", "--work", tmp_path / "work", "--out", out, "--json")
    code, text, errors = call(capsys, *command)
    assert code == 1 and "1 of 2 builds failed" in errors.splitlines()[-1]
    rows = json.loads(text.splitlines()[-1])["rows"]
    assert all(set(CONTRACT) <= set(row) for row in rows)
    good, bad = rows
    assert good["simulated"] and good["speedup"] >= 1.05 and Path(good["bundle"]).is_dir()
    assert "cannot be met" in bad["error"] and bad["latency_ms"] is None

    with open(out / "rows.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert float(table[0]["latency_ms.median"]) == good["latency_ms"]["median"]
    assert table[0]["tokens"] == " ".join(map(str, good["tokens"]))
    assert table[1]["error"] == bad["error"] and table[1]["latency_ms.median"] == ""
    page = (out / "index.html").read_text()
    assert "SIMULATED" in page and bad["job"] in page and page.count("<svg") == 1

    code, text, _ = call(capsys, *command, "--dry-run")
    assert code == 0 and [row["reused"] for row in json.loads(text.splitlines()[-1])["plan"]] == [True, False]


def test_lists_in_csv() -> None:
    rows = [{"error": None, "curve": (0.3, 0.2), "layers": ({"layer": 3, "error": 0.1},), "tokens": [9, 5]}]
    [row] = csv.DictReader(csv_bytes(rows).decode().splitlines())
    assert (row["curve"], row["tokens"], json.loads(row["layers"])) == (
        "0.3 0.2",
        "9 5",
        [{"layer": 3, "error": 0.1}],
    )


def test_parquet_has_the_same_rows(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed (extra ray)")
    rows = [
        {"job": "a", "error": "no", "tokens": None, "latency_ms": None, "kl": None},
        {"job": "b", "error": None, "tokens": [197, 120], "latency_ms": {"median": 1.5, "p99": 2.0}, "kl": 0.25},
    ]
    assert [path.name for path in write_tables(rows, tmp_path)] == ["rows.csv", "rows.parquet"]
    assert parquet.read_table(tmp_path / "rows.parquet").to_pylist() == [
        {"job": "b" if b else "a", "error": None if b else "no", "tokens": [197, 120] if b else None,
         "latency_ms.median": 1.5 if b else None, "latency_ms.p99": 2.0 if b else None, "kl": 0.25 if b else None}
        for b in (False, True)
    ]  # fmt: skip
