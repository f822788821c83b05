"""Overrides of a model's preprocessing, from the command line, Python or a sweep: their names and values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from edgeprune.errors import InputError
from edgeprune.records import CROP_MODES, INTERPOLATIONS

CHOICES = {"interpolation": INTERPOLATIONS, "crop_mode": CROP_MODES}
MOST_CROP_PCT = 4
OVERRIDES = ("crop_pct", "interpolation", "mean", "std", "crop_mode")


def checked(given: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of timm's data config with usable values. Raises InputError."""
    found: dict[str, Any] = {}
    for name, value in given.items():
        if name not in OVERRIDES:
            raise InputError(f"preprocessing has no {name!r}: choose from {', '.join(OVERRIDES)}")
        if name in CHOICES and value not in CHOICES[name]:
            raise InputError(f"{name} {value!r} is not supported: use {' or '.join(CHOICES[name])}")
        if isinstance(value, str) and name not in CHOICES:
            raise InputError(f"{name} {value!r} is text: pass numbers")
        if name in ("mean", "std"):
            value = _numbers(value)
            if len(value) != 3 or (name == "std" and min(value) <= 0):
                above = ", above 0" if name == "std" else ""
                raise InputError(f"{name} {given[name]!r}: pass three numbers for red, green and blue{above}")
        if name == "crop_pct" and not 0.05 <= (_numbers([value]) or (0,))[0] <= MOST_CROP_PCT:
            raise InputError(f"crop_pct {value!r} is out of range: pass 0.05 to {MOST_CROP_PCT}")
        found[name] = value
    return found


def _numbers(values: Any) -> tuple[float, ...]:
    """Finite numbers; empty where they are not."""
    try:
        found = tuple(map(float, values))
    except (TypeError, ValueError):
        return ()
    return found if all(map(math.isfinite, found)) else ()
