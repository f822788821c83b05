"""The documentation is true: commands that need no hardware are run, all are parsed, and names and paths exist."""

from __future__ import annotations

import re
import runpy
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest
import typer
from support.builds import Shallow, Shared, call, few_digits
from support.pages import PAGES, Command, blocks, commands, inline, script_of
from support.paths import ROOT
from support.processes import search_less

import edgeprune
from edgeprune import zoo
from edgeprune.bundles.bundle import Bundle
from edgeprune.cli import app
from edgeprune.scheduling.goals import Goal
from edgeprune.vit import recovery

GROUP: Any = typer.main.get_command(app)
BUNDLE = "engines/orin-nano/vit_digits/fold-fp16-b32-simulated"  # that of the tutorial

# In the place of what a reader has: another model with its weights, pictures, a bundle.
INSTEAD = {
    "vit_tiny_patch16_224": zoo.EMBEDDED,
    "deit_small_patch16_224": zoo.EMBEDDED,
    "vit_tiny.safetensors": "embedded",
    "FILE": "embedded",
    "CSV": "val/labels.csv",
}
# Added after the flags of a command; the last value of a flag counts. Every build becomes the one of the tutorial, so
# that its steps are reused and no hardware is needed.
DIGITS = "digits/labels.csv"
SIMULATED = ("--device", "orin-nano", "--simulate", "--precision", "fp16", "--batch", "32")
AS_IN_TUTORIAL = {"images": DIGITS, "goal": Goal(speedup=2.4), "search_images": 8, "neighbours": 0}
ADDED: dict[str, tuple[str, ...]] = {
    "build": (*SIMULATED, "--images", DIGITS, "--speedup", "2.4", "--search-images", "8", "--neighbours", "0"),
    "schedule": ("--search-images", "8"),
    "compile": ("--device", "cpu", "--rounds", "5"),
    "bench": ("--rounds", "5"),
}
# Commands of edgeprune that are parsed but not run, by the word that says so, with the reason.
PARSED_ONLY = {
    "--host": "needs another machine",
    "ship": "needs another machine",
    "sweep": "many builds: tests/sweeps runs some",
    "--ray": "starts a cluster: tests/distributed does",
}
# Commands that are not edgeprune's, by their first word, and why they are not run.
FOREIGN = {
    "sudo": "changes the system",
    "python3": "makes a virtual environment",
    ".": "activates a virtual environment",
    "pip": "needs a network",
    "export": "sets variables of the shell",
    "docker": "needs docker and a Jetson",
    "ansible-playbook": "run in tests/deploy",
    "jetson_clocks": "changes clocks",
}
# Flags in the text that are not edgeprune's but those of the scripts named next to them.
OTHER_FLAGS = {"--rounds", "--weights", "--images"}
SCRIPTS = "benchmarks/*.py"
# Paths in the text that come into being when something is run.
MADE = ("engines/", "benchmarks/baselines/", "calib/int8-")

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module", autouse=True)
def _short_search() -> Iterator[None]:
    """In every command alike, so that they find what the tutorial evaluated."""
    with pytest.MonkeyPatch.context() as patch:
        search_less(patch.setattr)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, shared: Shared) -> Iterator[Path]:
    """A folder with what a reader has, in which the tutorial was run: its steps in engines/.work are shared.

    The tutorial reads the first 72 of the embedded model's pictures.
    """
    place = tmp_path_factory.mktemp("reader")
    few_digits(place / "val", 12)
    few_digits(place / "digits", 72)
    (place / "calib").mkdir()
    (place / "calib" / "digits").symlink_to(place / "digits")
    shutil.copy(next((place / "val" / "images").iterdir()), place / "picture.png")
    shutil.copytree(shared.bundle, place / "bundle")
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", place / "release"], check=True, timeout=30)
    (place / "allowed_signers").write_text(f"release@example.com {(place / 'release.pub').read_text()}")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setattr(zoo, "images_dir", lambda: place / "digits")
        runpy.run_path(str(ROOT / "docs" / "tutorial.py"), run_name="__main__")
        yield place


def documented() -> list[Command]:
    """Every command line in a block of a page."""
    return [command for page in PAGES for command in commands(page)]


def reason_not_run(command: Command) -> str | None:
    """Why a command of edgeprune is not run by these tests."""
    return next((why for word, why in PARSED_ONLY.items() if word in command.words), None)


def adapted(words: Sequence[str], shallow: Shallow) -> list[str]:
    """The arguments of a documented command on what is in the folder, and as quick as it gets."""
    name, *rest = [INSTEAD.get(word, word) for word in words[1:]]
    if name != "build" and "--model" in rest:  # builds are the tutorial's, which is there
        rest[rest.index("--model") + 1] = shallow.model
    if name == "profile" and "--trunk" in rest:
        rest += ["--device", "cpu"]
    if name == "bench":
        rest = [BUNDLE if word == "bundle" else word for word in rest]  # noiseless: its latencies can be compared
    return [name, *rest, *ADDED.get(name, ())]


# --- commands are run ---


def test_tutorial(folder: Path) -> None:
    """The script of the tutorial page runs and leaves a bundle that is faster and about as good."""
    figures = Bundle.load(folder / BUNDLE).figures
    assert figures.speedup is not None and figures.speedup > 2 and figures.held_out
    assert figures.top1 is not None and figures.top1 > 95


@pytest.mark.parametrize("page", [page for page in PAGES if any(c.words[0] == "edgeprune" for c in commands(page))])
def test_commands_run(
    page: str, folder: Path, shallow: Shallow, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All commands of a page in order, each with exit code 0; where hardware is needed, they only parse."""
    monkeypatch.setattr(recovery, "Recipe", partial(recovery.Recipe, epochs=1, least_steps=0))
    for command in commands(page):
        if command.words[0] == "edgeprune" and reason_not_run(command) is None:
            code, _, err = call(capsys, *adapted(command.words, shallow))
            assert code == 0, f"{command}\n{err}"


def test_python_example_runs(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Python in the README finds the class of a digit; its build gets the arguments of the tutorial's."""
    build = edgeprune.build
    mine = {"model": zoo.EMBEDDED, "weights": None, **AS_IN_TUTORIAL}
    monkeypatch.setattr(edgeprune, "build", lambda model, **given: build(**given | mine), raising=False)
    examples = [block.text for block in blocks("README.md") if block.language == "python"]
    assert len(examples) == 1
    exec(compile(examples[0], "README.md", "exec"), {})
    assert capsys.readouterr().out.splitlines()[-1] in {str(digit) for digit in range(10)}


# --- names and flags exist ---


@pytest.mark.parametrize("command", [c for c in documented() if c.words[0] == "edgeprune"], ids=str)
def test_commands_parse(command: Command) -> None:
    """The command exists and accepts its arguments; click raises UsageError otherwise."""
    with GROUP.make_context("edgeprune", [*command.words[1:]]) as context:  # knows `--recover` without a value
        words: list[str] = [*context._protected_args, *context.args]
        name, rest = words[0], words[1:]
        assert name in GROUP.commands, f"{command}: there is no such command"
        GROUP.commands[name].make_context(name, rest)


def test_other_commands_are_known() -> None:
    """Scripts and make targets exist; what remains is listed with the reason why no test runs it."""
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    used = set()
    for command in documented():
        first, script = command.words[0], script_of(command)
        if first == "make":
            assert command.words[1] in targets, f"{command}: no such target in the Makefile"
        elif script is not None:
            assert script.is_file(), f"{command}: no such script"
            flags = [word for word in command.words if word.startswith("--")]
            missing = [flag for flag in flags if f'"{flag}"' not in script.read_text()]
            assert not missing, f"{command}: the script has no {missing}"
        elif first != "edgeprune":
            used.add(first)
    assert used <= set(FOREIGN), f"say in FOREIGN why these are not run: {used - set(FOREIGN)}"


def flags_of(name: str) -> set[str]:
    """The flags of a command of edgeprune."""
    return {flag for parameter in GROUP.commands[name].params for flag in parameter.opts}


def problems(text: str) -> Iterator[str]:
    """What is wrong with code in running text: `edgeprune X --flag`, `X --flag` or `--flag`."""
    words = text.split()
    words = words[1:] if words[0] == "edgeprune" and len(words) > 1 else words
    flags = [word.rstrip(",") for word in words if re.fullmatch(r"--[a-z][a-z0-9-]*,?", word)]
    if text.startswith("edgeprune ") and words[0] not in GROUP.commands:
        yield f"`{text}`: edgeprune has no command {words[0]!r}"
    elif words[0] in GROUP.commands:
        yield from (f"`{text}`: {words[0]} has no {flag}" for flag in flags if flag not in flags_of(words[0]))
    elif words[0].startswith("--"):
        known = set().union(*map(flags_of, GROUP.commands))
        yield from (f"`{text}`: no command has {flag}" for flag in flags if flag not in known)


@pytest.mark.parametrize("page", PAGES)
def test_names_in_the_text_exist(page: str) -> None:
    wrong = [problem for text in inline(page) for problem in problems(text)]
    assert not wrong


def test_wrong_names_are_noticed() -> None:
    """The checks above fail where they should."""
    assert list(problems("edgeprune bild")) and list(problems("edgeprune build --speed 2"))
    assert list(problems("--lock-clock")) and list(problems("compare --plots"))
    assert not list(problems("edgeprune compare --plot")) and not list(problems("--alpha 0.5"))
    bad = Command("x", 1, ("edgeprune", "build", "--no-such-flag"))
    with pytest.raises(Exception, match="no-such-flag"):
        test_commands_parse(bad)


@pytest.mark.parametrize("page", PAGES)
def test_paths_and_modules_exist(page: str) -> None:
    """Paths in the text are in the checkout, dotted names can be imported, links lead to a file."""
    for text in inline(page):
        if re.fullmatch(r"(edgeprune|docs|tests|calib|engines|benchmarks|deploy|docker|\.github)/[\w./*<>-]*", text):
            assert text.startswith(MADE) or list(ROOT.glob(text.rstrip("/"))), f"{page}: {text} does not exist"
        if re.fullmatch(r"(pipeline|latency|runtimes|vit|bundles|scheduling|edgeprune)(\.\w+)+", text):
            resolve_name(f"edgeprune.{text.removeprefix('edgeprune.')}")
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", (ROOT / page).read_text()):
        assert "://" in target or ((ROOT / page).parent / target).exists(), f"{page}: {target} does not exist"


@pytest.mark.parametrize("page", PAGES)
def test_every_block_names_its_language(page: str) -> None:
    """Commands are in `sh` blocks, so that none is left out of the tests."""
    for block in blocks(page):
        assert block.language in {"sh", "python", "toml", "text"}, f"{page}:{block.line}"
        if block.language != "sh":
            assert not re.search(r"^ *(\w+\$ )?edgeprune [a-z]", block.text, re.M), f"{page}:{block.line}"


def test_reasons_are_used() -> None:
    """No reason outlives the commands it was given for."""
    words = [set(command.words) for command in documented()]
    assert all(any(word in line for line in words) for word in (*PARSED_ONLY, *FOREIGN, *INSTEAD))


def test_error_tree_on_the_api_page() -> None:
    """The page shows lines of a source file by number: they are the tree of errors, whole."""
    first, last = map(int, re.findall(r"errors\.py:(\d+):(\d+)", (ROOT / "docs" / "api.md").read_text())[0])
    source = (ROOT / "edgeprune" / "errors.py").read_text()
    shown = re.findall(r"^[│├└─ ]*(\w+)", "\n".join(source.splitlines()[first - 1 : last]), re.M)
    assert sorted(shown) == sorted(re.findall(r"^class (\w+)", source, re.M))


def test_drawings_match_the_layers() -> None:
    """The README and the architecture page draw the layers that import-linter checks, in their order."""
    text = (ROOT / "pyproject.toml").read_text()
    contract = text[text.index("layers = [") : text.index("]", text.index("layers = ["))]
    layers = re.findall(r"edgeprune\.(\w+)", contract)
    drawing = next(b.text for b in blocks("docs/architecture.md") if b.text.lstrip().startswith("cli"))
    words = [word for line in drawing.splitlines() for word in line[:30].split()]
    assert words == layers
    tree = next(block.text for block in blocks("README.md") if "cli/" in block.text)
    folders = re.findall(r"^  (\w+)/", tree, re.M)
    packages = [name for name in layers if (ROOT / "edgeprune" / name).is_dir()]
    assert folders == packages
