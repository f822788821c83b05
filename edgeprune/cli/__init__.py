"""The command line: parse, call one function, print. Heavy imports happen inside the commands."""

from edgeprune.cli import (
    build_commands,
    bundle_commands,
    fleet_commands,
    machine_commands,
    plan_commands,
    sweep_commands,
)
from edgeprune.cli.app import app, main

__all__ = [
    "app",
    "build_commands",
    "bundle_commands",
    "fleet_commands",
    "machine_commands",
    "main",
    "plan_commands",
    "sweep_commands",
]
