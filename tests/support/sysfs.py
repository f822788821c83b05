"""A sysfs tree with INA3221 power sensors."""

from __future__ import annotations

from pathlib import Path


def sensors(root: Path, chips: list[dict[str, tuple[str, str]]]) -> None:
    """A sysfs tree with INA3221s: label to (mV, mA); "" is a file that cannot be read as a number."""
    for index, rails in enumerate(chips):
        folder = root / f"1-004{index}" / "hwmon" / f"hwmon{index}"
        folder.mkdir(parents=True)
        for channel, (label, (millivolts, milliamperes)) in enumerate(rails.items(), 1):
            (folder / f"in{channel}_label").write_text(f"{label}\n")
            (folder / f"in{channel}_input").write_text(f"{millivolts}\n")
            (folder / f"curr{channel}_input").write_text(f"{milliamperes}\n")
        (folder / "in7_label").write_text("sum of shunt voltages\n")  # has no current


NANO = [{"VDD_IN": ("5000", "1400"), "VDD_CPU_GPU_CV": ("5000", "400"), "VDD_SOC": ("5000", "300")}]
AGX = [
    {"VDD_GPU_SOC": ("20000", "500"), "VDD_CPU_CV": ("20000", "100"), "VIN_SYS_5V0": ("5000", "600")},
    {"NC": ("", ""), "VDDQ_VDD2_1V8AO": ("5000", "200")},
]
