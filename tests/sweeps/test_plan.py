"""SWEEP.toml: which builds it means, on which boards, and what is said about a mistake in it."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import pytest
from support.builds import few_digits
from support.pages import blocks

from edgeprune.errors import DeviceError, EdgepruneError
from edgeprune.scheduling.goals import Goal
from edgeprune.sweeps.plan import HERE, boards_of, jobs_of

WHOLE = """
models = ["vit_digits", { name = "vit_tiny_patch16_224", weights = "tiny.safetensors", images = "val" }]
devices = ["cpu", { name = "orin-nano", simulate = true, precisions = ["fp16"], batches = [1, 4] }]
goals = [{ speedup = 1.5 }, { max_drop = 1 }]
methods = ["fold", "tome"]
"""


def sweep(folder: Path, text: str) -> Path:
    path = folder / "s.toml"
    path.write_text(text)
    return path


def test_every_combination_once(tmp_path: Path) -> None:
    jobs = jobs_of(sweep(tmp_path, WHOLE))
    here = [job for job in jobs if job.board == HERE]
    assert len(here) == 2 * 2 * 2 and len(jobs) == len(here) * (1 + 2)
    assert {(job.precision, job.batch, job.simulate) for job in here} == {("fp32", 1, False)}
    other = {(job.precision, job.batch, job.simulate) for job in jobs if job not in here}
    assert other == {("fp16", 1, True), ("fp16", 4, True)}
    assert {job.goal for job in jobs} == {Goal(speedup=1.5), Goal(max_drop=1)}
    assert len({job.name for job in jobs}) == len(jobs)


def test_the_examples_of_the_documentation(tmp_path: Path) -> None:
    first, example = (block.text for block in blocks("docs/sweep.md") if block.language == "toml")
    assert len(jobs_of(sweep(tmp_path, first))) == 2 * 3 * 2
    jobs = jobs_of(sweep(tmp_path, example))
    assert len(jobs) == 2 * (1 + 2 + 1) * 2
    assert {job.board for job in jobs} == {HERE, "orin-nano, simulated", "agx-orin, simulated"}


def test_paths_are_found_from_the_file(tmp_path: Path) -> None:
    options = jobs_of(sweep(tmp_path, WHOLE))[-1].options(tmp_path / "work", tmp_path / "out")
    assert options.weights == str(tmp_path / "tiny.safetensors") and options.images == tmp_path / "val"


def test_a_name_is_a_folder_beside_the_file_or_one_of_timm(tmp_path: Path) -> None:
    """As --model: a folder that is called like a model of timm is one of transformers, or is not meant."""
    for name in ("vit_tiny_patch16_224", "mine", "deit_tiny_patch16_224"):
        (tmp_path / name).mkdir()
    (tmp_path / "deit_tiny_patch16_224" / "config.json").write_text("{}")
    names = {
        "vit_tiny_patch16_224": "vit_tiny_patch16_224",
        "vit_digits": "vit_digits",
        "mine": f"{tmp_path}/mine",
        "deit_tiny_patch16_224": f"{tmp_path}/deit_tiny_patch16_224",
        "local-dir:theirs": f"local-dir:{tmp_path}/theirs",
        "local-dir:/abs": "local-dir:/abs",
        "hf-hub:mine/too": "hf-hub:mine/too",
    }
    text = f'models = {list(names)}\ndevices = ["cpu"]\ngoals = [{{ alpha = 0.5 }}]\n'
    jobs = jobs_of(sweep(tmp_path, text))
    assert [job.model.name for job in jobs] == list(names.values())


def test_options_of_a_model(tmp_path: Path) -> None:
    (tmp_path / "head.onnx").write_bytes(b"")
    (tmp_path / "texts.npy").write_bytes(b"1")
    few_digits(tmp_path / "train")
    text = """
    models = [
      { name = "vit_digits", layers = [3, 12], head = "head.onnx", image_size = [224, 192], recover = false },
      { name = "vit_digits", task = "embed", text_embeddings = "texts.npy", image_size = 224 },
      { name = "vit_digits", recover = true },
      { name = "vit_digits", recover = false, preprocessing = { crop_pct = 0.9, mean = [0.5, 0.5, 0.4] } },
    ]
    devices = ["cpu"]
    goals = [{ alpha = 0.5 }]
    recover = "train/labels.csv"
    """
    jobs = jobs_of(sweep(tmp_path, text))
    dense, embed, tuned, other = (job.options(tmp_path, tmp_path) for job in jobs)
    assert (dense.layers, dense.head, dense.image_size) == ((3, 12), tmp_path / "head.onnx", (224, 192))
    assert (dense.recover, embed.recover, tuned.recover) == (False, tmp_path / "train" / "labels.csv", True)
    assert other.overrides == {"crop_pct": 0.9, "mean": [0.5, 0.5, 0.4]} and not tuned.overrides
    assert (embed.task, embed.text_embeddings, embed.image_size) == ("embed", tmp_path / "texts.npy", (224, 224))
    assert [job.label for job in jobs] == [
        "vit_digits-224x192-layers-3-12-head", "vit_digits-embed-224x224-texts-recovered", "vit_digits-recovered",
        "vit_digits-crop_pct-0.9-mean-0.5-0.5-0.4",
    ]  # fmt: skip
    before = jobs[1].key()
    (tmp_path / "texts.npy").write_bytes(b"2")
    changed = jobs[1].key()
    few = (tmp_path / "train" / "labels.csv").read_text().splitlines()[:5]
    (tmp_path / "train" / "labels.csv").write_text("\n".join(few))
    assert len({before, changed, jobs[1].key()}) == 3, "what --resume keeps depends on these files"


def test_a_device_file_is_found_from_the_file(tmp_path: Path) -> None:
    (tmp_path / "boards").mkdir()
    own = tmp_path / "boards" / "mine.toml"
    own.write_bytes((resources.files("edgeprune.devices") / "orin-nano.toml").read_bytes())
    (tmp_path / "hosts.toml").write_text('[[to]]\nhost = "a@nano-1"\ndir = "m"\ndevice = "boards/mine.toml"\n')
    text = """
    models = ["vit_digits"]
    devices = [{ name = "boards/mine.toml", simulate = true }, "boards/mine.toml"]
    goals = [{ alpha = 0.5 }]
    hosts = "hosts.toml"
    """
    jobs = jobs_of(sweep(tmp_path, text))
    assert [(job.device, job.board) for job in jobs] == [
        (str(own), "mine, simulated"), (str(own), "a@nano-1"),
    ]  # fmt: skip
    assert jobs[1].name == "mine/vit_digits/fold-fp32-b1-alpha-0.5" and jobs[0].name == f"{jobs[1].name}-simulated"
    before = jobs[0].key()
    own.write_text(own.read_text() + "\n# edited\n")
    assert jobs[0].key() != before, "--resume builds again after an edit"


def test_checkpoints_of_one_name_have_labels_of_their_own(tmp_path: Path) -> None:
    model = '{{ name = "vit_tiny_patch16_224", weights = "{}/model.safetensors" }}'
    models = f'{model.format("a")}, {model.format("b")}, "vit_digits"'
    text = f'models = [{models}]\ndevices = ["cpu"]\ngoals = [{{ alpha = 1 }}]'
    first, second, third = jobs_of(sweep(tmp_path, text))
    assert first.label != second.label and first.name != second.name and third.label == "vit_digits"
    assert first.label.startswith("vit_tiny_patch16_224-model-")
    text = text.replace("b/model", "a/model")
    with pytest.raises(EdgepruneError, match="appears twice"):
        jobs_of(sweep(tmp_path, text))


def test_boards_behind_ssh_come_from_hosts_toml(tmp_path: Path) -> None:
    (tmp_path / "hosts.toml").write_text(
        '[[to]]\nhost = "a@nano-1"\ndir = "m"\ndevice = "orin-nano"\n'
        '[[to]]\nhost = "a@nano-2"\ndir = "m"\ndevice = "orin-nano"\nprogram = "/opt/edgeprune"\n'
        '[[to]]\nhost = "a@other"\ndir = "m"\n'
    )
    text = WHOLE.replace(', { name = "orin-nano", simulate = true', ', { name = "orin-nano"')
    boards = boards_of(jobs_of(sweep(tmp_path, f'hosts = "hosts.toml"\n{text}')))
    assert set(boards) == {HERE, "a@nano-1", "a@nano-2"}, "whatever device they are called"
    assert {job.host.program for job in boards["a@nano-2"] if job.host} == {"/opt/edgeprune"}
    works = {job.options(tmp_path, tmp_path).work for jobs in boards.values() for job in jobs}
    assert len(works) == len(boards), "each board has a work folder of its own"


def test_a_board_that_is_not_there(tmp_path: Path) -> None:
    text = WHOLE.replace(', { name = "orin-nano", simulate = true', ', { name = "orin-nano"')
    with pytest.raises(DeviceError, match=r"orin-nano is not this machine.*--host USER@HOST"):
        jobs_of(sweep(tmp_path, text))


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("models =", "modles =", "unknown key 'modles': did you mean 'models'?"),
        ("simulate =", "simulated =", "devices: unknown key 'simulated': did you mean 'simulate'?"),
        ("{ max_drop = 1 }", "{ max_drp = 1 }", "goals: unknown key 'max_drp': did you mean 'max_drop'?"),
        ("weights =", "zzz =", "models: unknown key 'zzz': known are name, weights, images, task"),
        ("weights =", "image_size = 0, weights =", "image_size 0: pass H,W in pixels"),
        ("weights =", "preprocessing = { crop = 1 }, weights =", "preprocessing has no 'crop': choose from crop_pct"),
        ("weights =", 'task = "detect", weights =', "unknown task 'detect'"),
        ("weights =", "layers = 3, weights =", "Expected `array`, got `int` - at `$.models[1].layers`"),
        ("{ max_drop = 1 }", "{ max_drop = 1, speedup = 2 }", "speedup and max_drop are 2 goals: set only one"),
        ("{ speedup = 1.5 }", "{ speedup = 0.5 }", "s.toml: goal speedup = 0.5 is out of range: use 1 to"),
        ("{ speedup = 1.5 }", "{}", "a goal is empty"),
        ("methods =", "rounds = 4\nmethods =", "rounds = 4 is too few: use 5 or more"),
        ('["fold", "tome"]', "[]", "methods is empty"),
        ('["fold", "tome"]', '["fold", "fold"]', "twice"),
        ('["fold", "tome"]', '["fild"]', "fild"),
        ('"fp16"', '"fp17"', "unknown precision 'fp17'"),
        ('"cpu"', '"gpu"', "unknown device 'gpu'"),
        ("[1, 4]", '["one"]', r"Expected `int`, got `str` - at `$.devices[1].batches[0]`"),
        ("models =", "models", "not a sweep"),
    ],
)
def test_a_mistake_is_named_in_one_line(tmp_path: Path, old: str, new: str, said: str) -> None:
    with pytest.raises(EdgepruneError) as error:
        jobs_of(sweep(tmp_path, WHOLE.replace(old, new, 1)))
    assert said in str(error.value) and "\n" not in str(error.value)
