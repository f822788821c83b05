"""edgeprune from Python, step by step: `python docs/tutorial.py`. Takes about a minute and writes to engines/."""

# %% What is needed
# Nothing but the package: the model is the embedded one, `vit_digits`, a ViT with 12 blocks and 197 tokens that reads
# scanned digits. The device is a simulated Jetson Orin Nano, so latencies are computed, not measured, and the output
# says so. On the device itself, leave out `simulate=True`. `device="cpu"` measures this machine.
import torch

import edgeprune
from edgeprune import images, zoo
from edgeprune.vit.models import load_model

SETTING = {"device": "orin-nano", "simulate": True, "precision": "fp16", "batch": 32}
LABELS = zoo.images_dir() / "labels.csv"  # 450 pictures with their classes: columns image, label

# %% Profile: latency as a function of the number of tokens
# `points` are the token counts that were measured, each with the latency of all blocks at that count.
staircase = edgeprune.profile(**SETTING, method="fold")  # what a cut costs is measured, too
for point in staircase.points[::4]:
    print(f"{point.tokens:4} tokens: {point.latency.median_ms:.3f} ms")

# %% Schedule: how many tokens leave each block
# The search compares schedules on a few pictures and needs no labels. It predicts latency from the staircase, so
# nothing is measured here.
goal = edgeprune.Goal(speedup=2.4)
schedule = edgeprune.schedule(staircase, images=LABELS, goal=goal, search_images=8)
print("tokens per block:", schedule.tokens)
print(f"predicted: {schedule.predicted_ms:.3f} ms instead of {staircase.dense.median_ms:.3f} ms")

# %% Prune: the same model in PyTorch
# For those who stay in PyTorch. The pruned module shares its parameters with the original one, takes any batch size,
# and can be trained.
model = load_model("vit_digits")
pruned = edgeprune.prune(model.module, schedule)
first = images.load_images(LABELS)
pixels = images.load_pixels(first.paths[:64], model.preprocessing)
batch = torch.from_numpy(images.normalise(pixels, model.preprocessing))  # (64, 3, 28, 28)
with torch.no_grad():
    same = pruned(batch).argmax(1) == model.module(batch).argmax(1)
print(f"pruned and unpruned agree on {same.sum()} of {len(same)} pictures")

# %% Build: from model to bundle in one call
# The same steps, then ONNX with fixed shapes, an engine, its measured latency and its accuracy. By default the three
# most promising similar schedules are built and timed too (`neighbours=3`); here that is left out to save time.
# `progress` is called with what is being done, how much of it is done, and how much there is. All steps are kept in
# engines/.work: run this script again, and it takes a few seconds.
steps: dict[str, int] = {}
bundle = edgeprune.build(
    images=LABELS,
    goal=goal,
    search_images=8,
    neighbours=0,
    progress=lambda what, done, total: steps.update({what: total}),
    **SETTING,
)
print(f"{bundle.path}: made in {len(steps)} kinds of steps")

# %% Figures: what was measured
# Fidelity is of pictures that were not used to choose the schedule (`held_out`).
figures = bundle.figures
print(f"{figures.speedup:.2f} times faster: {figures.latency.median_ms:.3f} ms for a batch of {SETTING['batch']}")
print(f"top-1 {figures.top1:.1f} %, unpruned {figures.dense_top1:.1f} %, agreement {figures.agreement:.1f} %")
print(f"on {figures.images} pictures, held out: {figures.held_out}")

# %% Predict: pictures through the engine
# `Bundle.load` opens a bundle later, or on another machine. It checks the hash of every file.
bundle = edgeprune.Bundle.load(bundle.path)
for prediction in bundle.predict(first.paths[:3], top=2).rows:
    best = prediction.top[0]
    print(f"{prediction.image.name}: {best.label} ({best.percent:.1f} %)")

# %% Verify: is it complete, and does it still compute what it did?
for check in bundle.verify():
    print(f"{check.status:8} {check.name}: expected {check.expected}, found {check.found}")
print(f"the report page: {bundle.path / 'report.html'}")
