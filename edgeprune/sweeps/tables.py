"""The rows of a sweep as CSV and as Parquet."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from edgeprune.errors import MissingError, install
from edgeprune.io import replacing, write_bytes

Row = Mapping[str, Any]


def flat(row: Row, prefix: str = "") -> dict[str, Any]:
    """A row with the keys of tables in it joined by a dot: latency_ms.median. Lists stay lists."""
    found: dict[str, Any] = {}
    for key, value in row.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def columns(rows: Sequence[Row]) -> list[str]:
    """All columns of flat rows in the order in which they first appear; one that only failures have is last."""
    names = dict.fromkeys(name for row in sorted(rows, key=lambda r: r["error"] is not None) for name in row)
    tables = {name.rpartition(".")[0] for name in names if "." in name}
    return [name for name in names if name not in tables]  # a table that a failed build does not have


def csv_bytes(rows: Sequence[Row]) -> bytes:
    """Rows as CSV: lists are numbers with spaces between, of tables JSON; an unknown figure is empty."""
    level = [flat(row) for row in rows]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns(level), restval="", extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for row in level:
        writer.writerow({name: cell(value) for name, value in row.items()})
    return text.getvalue().encode()


def cell(value: Any) -> Any:
    """A value of a row in CSV."""
    if not isinstance(value, list | tuple):
        return value
    if any(isinstance(each, Mapping) for each in value):
        return json.dumps(value)
    return " ".join(map(str, value))


def write_tables(rows: Sequence[Row], out: Path) -> list[Path]:
    """Write rows.csv, and rows.parquet where pyarrow is installed; their paths. Raises OutputError."""
    paths = [out / "rows.csv"]
    write_bytes(paths[0], csv_bytes(rows))
    if find_spec("pyarrow") is not None:
        paths.append(out / "rows.parquet")
        write_parquet(rows, paths[1])
    return paths


def write_parquet(rows: Sequence[Row], path: Path) -> None:
    """Rows as Parquet, lists as lists. Raises MissingError, OutputError."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingError(f"Parquet needs pyarrow ({error}): {install('ray')}") from None
    level = [flat(row) for row in rows]
    names = columns(level)
    table = pyarrow.table({name: pyarrow.array([row.get(name) for row in level]) for name in names})
    with replacing(path) as temporary:
        pyarrow.parquet.write_table(table, temporary)
