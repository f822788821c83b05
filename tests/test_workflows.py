"""The CI workflows: valid by GitHub's schema, safe on one's own runner, and the Jetson job's steps run for real."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML
from support.builds import ONE_THREAD, QUICK, Shallow, few_digits
from support.paths import ROOT

from edgeprune import cli
from edgeprune.devices import load_device, names

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
RUNNER = ROOT / "docker" / "runner"
ACTIONS = {"checkout": "v4", "cache": "v4", "upload-artifact": "v4", "setup-python": "v5"}
DATA = (".github", "calib", "edgeprune")  # of the checkout, what the job needs


def parsed(path: Path) -> Any:
    """A YAML 1.2 file, in which `on` is no boolean."""
    return YAML(typ="safe").load(path.read_text())


JETSON = parsed(ROOT / ".github" / "workflows" / "jetson-bench.yml")
JOB = JETSON["jobs"]["bench"]
STEPS = {step.get("name", "checkout"): step for step in JOB["steps"]}


def steps_of(workflow: Any) -> list[Any]:
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


# --- what the files say ---


@pytest.mark.parametrize(
    ("schema", "path"),
    [*(("github-workflows", path) for path in WORKFLOWS), ("compose-spec", RUNNER / "compose.yaml")],
    ids=lambda value: value.name if isinstance(value, Path) else value,
)
def test_valid_by_its_schema(schema: str, path: Path, tmp_path: Path) -> None:
    """And the schema is one that a mistake fails."""
    pytest.importorskip("check_jsonschema")
    broken = tmp_path / path.name
    wrong = {"github-workflows": ("runs-on", "run-on"), "compose-spec": ("runtime", "runtimes")}[schema]
    assert wrong[0] in path.read_text()
    broken.write_text(path.read_text().replace(*wrong))
    for file, valid in ((path, True), (broken, False)):
        command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", f"vendor.{schema}", str(file)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert (done.returncode == 0) is valid, done.stdout + done.stderr


def test_both_workflows_are_there() -> None:
    assert [path.name for path in WORKFLOWS] == ["ci.yml", "jetson-bench.yml"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_least_rights_known_actions_no_injection(path: Path) -> None:
    workflow = parsed(path)
    assert workflow["permissions"] == {"contents": "read"}
    assert not [job for job in workflow["jobs"].values() if "permissions" in job]
    for step in steps_of(workflow):
        if "uses" in step:
            name, _, version = step["uses"].removeprefix("actions/").partition("@")
            assert ACTIONS[name] == version
            if name == "checkout":
                assert step["with"]["persist-credentials"] is False
        else:
            assert "${{" not in step["run"], "values reach the shell through the environment alone"


def test_no_pull_request_reaches_a_runner_of_ones_own() -> None:
    assert set(JETSON["on"]) == {"push", "schedule", "workflow_dispatch"}
    assert JETSON["on"]["push"] == {"branches": ["main"]}
    assert JOB["runs-on"] == ["self-hosted", "jetson", "${{ matrix.device }}"]
    for path in WORKFLOWS:
        workflow = parsed(path)
        if "pull_request" in workflow["on"] or "pull_request_target" in workflow["on"]:
            assert not [job for job in workflow["jobs"].values() if "self-hosted" in str(job["runs-on"])]


def test_a_model_of_ones_own_has_pretrained_weights_by_default() -> None:
    """GitHub's || and && are Python's or and and."""
    for own, weights, wanted in (("", "", "embedded"), ("vit_b", "", "pretrained"), ("vit_b", "b.pth", "b.pth")):
        expression = re.sub(r"vars\.EDGEPRUNE_(\w+)", r"\1", JOB["env"]["WEIGHTS"].strip("${} "))
        python = expression.replace("||", "or").replace("&&", "and")
        assert eval(python, {"MODEL": own, "WEIGHTS": weights}) == wanted


def test_default_devices_can_be_built_for() -> None:
    found = re.fullmatch(
        r"\$\{\{ fromJSON\(vars\.EDGEPRUNE_DEVICES \|\| '(.+)'\) \}\}", JOB["strategy"]["matrix"]["device"]
    )
    assert found is not None
    chosen = json.loads(found[1])
    assert chosen and set(chosen) <= set(names()) and all(load_device(name).machine for name in chosen)


def test_hosted_machines_run_what_a_contributor_runs() -> None:
    workflow = parsed(ROOT / ".github" / "workflows" / "ci.yml")
    assert workflow["jobs"]["test"]["strategy"]["matrix"]["python"] == ["3.10", "3.11", "3.12", "3.13"]
    for name, job in workflow["jobs"].items():
        [command] = [step["run"] for step in job["steps"] if "run" in step]
        assert command == f"make {name} PYTHON=python"
        assert re.search(rf"^{name}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


# --- the Jetson job, executed ---


def environment(folder: Path, **changes: str) -> dict[str, str]:
    """The job's env, its expressions replaced by what they are for a CPU and this checkout's copy."""
    values = {"DEVICE": "cpu", "PYTHONPATH": str(folder), "BASELINE": "benchmarks/baselines/cpu.json"}
    values |= {"MODEL": f"local-dir:{folder}/shallow", "WEIGHTS": "pretrained", "IMAGES": "digits/labels.csv"}
    values |= {
        "PRECISION": "fp32",
        "SPEEDUP": "1.25",
        "METHOD": "topk",
        "SEARCH_IMAGES": QUICK[1],
        "ROUNDS": QUICK[3],
        "FAIL_SLOWER": "100000",
    }
    assert set(values) == set(JOB["env"]), "each is set here, and nothing else"
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    extra = {"PATH": path, "GITHUB_STEP_SUMMARY": str(folder / "step-summary.md"), **ONE_THREAD}
    return os.environ | values | extra | changes


def checkout(folder: Path, shallow: Shallow) -> Path:
    """A fresh checkout, as far as the job needs it, with a model and pictures of one's own; it measures less."""
    for name in DATA:
        shutil.copytree(ROOT / name, folder / name)
    shutil.copytree(shallow.model.partition(":")[2], folder / "shallow")
    few_digits(folder / "digits")
    for name, users, ours in (
        ("latency/profiling", "ROUNDS = 3 * FEW", "ROUNDS = FEW"),
        ("latency/timing", "WARMUP_S = 10.0", "WARMUP_S = 0.1"),
        ("latency/timing", "WARMUP_MS = 300.0", "WARMUP_MS = 20.0"),
        ("benchmark/peak", "WARMUP_S = 1.0", "WARMUP_S = 0.1"),
        ("cli/build_commands", 'to build and time", min=0)] = 3', 'to build and time", min=0)] = 1'),
    ):
        path = folder / "edgeprune" / f"{name}.py"
        assert users in path.read_text()
        path.write_text(path.read_text().replace(users, ours))
    return folder


def run_step(name: str, folder: Path, **changes: str) -> subprocess.CompletedProcess[str]:
    """A step's shell, word for word."""
    assert JETSON["defaults"] == {"run": {"shell": "bash"}}
    command = ["bash", "--noprofile", "--norc", "-euo", "pipefail", "-c", STEPS[name]["run"]]
    options: dict[str, Any] = {"cwd": folder, "env": environment(folder, **changes), "timeout": 900}
    return subprocess.run(command, capture_output=True, text=True, **options)


def job(folder: Path) -> str:
    """All steps that have a shell, in order; what they said on stderr."""
    said = ""
    for step in JOB["steps"]:
        if "run" in step:
            done = run_step(step["name"], folder)
            assert done.returncode == 0, f"{step['name']}: {done.stdout}{done.stderr}"
            said += done.stderr
    return said


def uploaded(folder: Path) -> dict[str, list[Path]]:
    """Files by the pattern that uploads them."""
    patterns = STEPS["JSON, plots and report"]["with"]["path"].split()
    return {p: [f for f in folder.glob(p + "**/*" if p.endswith("/") else p) if f.is_file()] for p in patterns}


@pytest.fixture(scope="module")
def first_run(shallow: Shallow, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a job without a baseline, that found the profiling models of an earlier build in its cache."""
    folder = checkout(tmp_path_factory.mktemp("first"), shallow)
    shallow.work(folder / cached())
    job(folder)
    return folder


def cached() -> str:
    """What actions/cache carries from one run to the next."""
    path: str = STEPS["Finished steps of earlier builds"]["with"]["path"]
    return path


def test_cache_is_restored_for_the_same_sources_alone() -> None:
    """What other code built must not be benched in its stead."""
    options = STEPS["Finished steps of earlier builds"]["with"]
    assert "restore-keys" not in options
    assert re.search(r"hashFiles\('edgeprune/\*\*'", options["key"])


def test_first_run_writes_a_baseline_and_says_so(first_run: Path) -> None:
    summary = (first_run / "step-summary.md").read_text()
    assert "No baseline yet: this run wrote benchmarks/baselines/cpu.json. Commit it" in summary
    assert "| engines/cpu/bundle |" in summary and "speed-up to the first" in summary
    stored = json.loads((first_run / "benchmarks" / "baselines" / "cpu.json").read_text())
    assert stored == json.loads((first_run / "results" / "bench.json").read_text())
    assert json.loads((first_run / "results" / "build.json").read_text())["method"] == "topk"


def test_everything_to_upload_is_there(first_run: Path) -> None:
    found = uploaded(first_run)
    if not hasattr(cli, "report"):  # a build writes a page as soon as there is `edgeprune report`
        found.pop("engines/**/report.html")
    assert all(found.values()), found
    everything = {path.relative_to(first_run).as_posix() for paths in found.values() for path in paths}
    assert {"results/bench.json", "results/build.json", "results/bench.md"} <= everything
    assert {"benchmarks/baselines/cpu.json", "engines/cpu/bundle/staircase.svg"} <= everything


def test_second_run_builds_from_the_cache_and_is_measured_by_the_baseline(
    shallow: Shallow, first_run: Path, tmp_path: Path
) -> None:
    """A fresh checkout with nothing but what actions/cache carries and the baseline that was committed."""
    folder = checkout(tmp_path, shallow)
    for kept in (cached(), "benchmarks"):
        shutil.copytree(first_run / kept, folder / kept)
    steps = {path.name: path.stat().st_mtime_ns for path in (folder / cached()).iterdir() if path.suffix == ".onnx"}
    said = job(folder)
    assert "reused" in said and not [line for line in said.splitlines() if line.endswith(": done")], said
    assert steps == {p.name: p.stat().st_mtime_ns for p in (folder / cached()).iterdir() if p.suffix == ".onnx"}
    assert "to baseline" in (folder / "step-summary.md").read_text()
    assert json.loads((folder / "results" / "bench.json").read_text())["rows"][0]["baseline_ratio"] > 0


def test_slower_than_the_baseline_fails_with_3_and_the_summary_says_why(first_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(first_run, folder)
    path = folder / "benchmarks" / "baselines" / "cpu.json"
    fast = json.loads(path.read_text())
    for row in fast["rows"]:
        row["samples_ms"] = [ms / 1000 for ms in row["samples_ms"]]
    path.write_text(json.dumps(fast))
    (folder / "step-summary.md").unlink()
    done = run_step("Bench", folder, FAIL_SLOWER="5")
    assert done.returncode == 3, done.stderr
    assert done.stderr.splitlines()[-1].startswith("failed: slower than the baseline by more than 5 %")
    assert STEPS["Summary"]["if"] == STEPS["JSON, plots and report"]["if"] == "${{ !cancelled() }}"
    assert run_step("Summary", folder).returncode == 0
    assert "slower than the baseline" in (folder / "step-summary.md").read_text()


def test_baseline_of_another_setup_fails_with_1(first_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(first_run, folder)
    done = run_step("Bench", folder, EDGEPRUNE_THREADS="2")
    assert done.returncode == 1 and "threads" in done.stderr


# --- the runner ---


def test_runner_image_installs_what_the_job_imports() -> None:
    text = re.sub(r"\\\n", " ", re.sub(r"^\s*#.*\n", "", (RUNNER / "Dockerfile").read_text(), flags=re.MULTILINE))
    lines = [line.split(None, 1) for line in text.splitlines() if line.strip()]
    assert {word for word, _ in lines} <= {"FROM", "ENV", "RUN", "COPY", "ARG", "USER", "WORKDIR", "ENTRYPOINT"}
    assert dict(lines)["FROM"] == load_device("orin-nano").image
    for source in (s for word, rest in lines if word == "COPY" for s in shlex.split(rest)[:-1]):
        assert (ROOT / source).exists(), source
    extras = {e for found in re.findall(r"/src\[([\w,-]+)\]", text) for e in found.split(",")}
    assert extras == {"export", "ort"}
    assert [rest for word, rest in lines if word == "USER"] == ["runner"], "jobs do not run as root"
    assert "sha256sum --check" in text


def test_compose_gives_what_dockerfile_and_start_ask_for() -> None:
    runner = parsed(RUNNER / "compose.yaml")["services"]["runner"]
    context = (RUNNER / runner["build"]["context"]).resolve()
    assert context == ROOT and (context / runner["build"]["dockerfile"]).is_file()
    args = re.findall(r"^ARG (\w+)$", (RUNNER / "Dockerfile").read_text(), re.MULTILINE)
    assert set(runner["build"]["args"]) == set(args)
    start = (RUNNER / "start.sh").read_text()
    asked = set(re.findall(r"\$\{(\w+):\?", start))
    assert set(runner["environment"]) == asked == {"REPOSITORY", "DEVICE", "TOKEN"}
    assert all(volume.endswith(":ro") for volume in runner["volumes"]) and "privileged" not in runner


@pytest.fixture
def home(tmp_path: Path) -> Callable[..., tuple[int, list[str]]]:
    """home(**env) starts the script where config.sh and run.sh only note their calls."""
    calls = tmp_path / "calls"
    for name, more in (("config.sh", "touch .runner"), ("run.sh", f'echo "token ${{TOKEN-none}}" >> {calls}')):
        (tmp_path / name).write_text(f'#!/bin/sh\necho "{name} $*" >> {calls}\n{more}\n')
        (tmp_path / name).chmod(0o755)

    def start(**env: str) -> tuple[int, list[str]]:
        calls.write_text("")
        options: dict[str, Any] = {
            "cwd": tmp_path,
            "env": {"PATH": os.environ["PATH"], **env},
            "capture_output": True,
        }
        done = subprocess.run(["bash", str(RUNNER / "start.sh")], timeout=60, **options)
        return done.returncode, calls.read_text().splitlines()

    return start


def test_runner_registers_once_and_hides_its_token(home: Callable[..., tuple[int, list[str]]]) -> None:
    common = {"REPOSITORY": "https://github.com/you/yours", "DEVICE": "orin-nano"}
    assert home(**common) == (1, []), "a first start needs a token"
    code, calls = home(**common, TOKEN="secret")
    assert code == 0 and calls[1:] == ["run.sh ", "token none"]
    assert calls[0].startswith("config.sh --unattended") and calls[0].endswith("--labels jetson,orin-nano")
    assert home(**common) == (0, ["run.sh ", "token none"]), "a restart does not register again"
