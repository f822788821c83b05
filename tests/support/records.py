"""Setups of hand-made records."""

from __future__ import annotations

import msgspec

from edgeprune.records import Setup

SETUP = Setup(device="test", machine="test", runtime="fake", runtime_version="1", precision="fp32", batch=1)
NOISELESS = msgspec.structs.replace(SETUP, noiseless=True)
