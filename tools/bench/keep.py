"""`python -m act24.tools.bench.keep ROWS.json…`: add what `act24 bench … --json` printed to
docs/results/kernels.json, which keeps every run of a row. Pages quote ranges over the runs that are not
superseded, and a test compares them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from act24.errors import Act24Error, reading
from act24.tools.commands.edge import ends_in_one_line
from act24.tools.files import whole_file

FILE = Path(__file__).resolve().parents[2] / "docs" / "results" / "kernels.json"

#: What a run says of itself beside its figures.
NEEDED = ("name", "ours", "other", "unit", "ratio", "batch", "gpu", "versions", "commit")


def keep(new: Path, file: Path = FILE) -> int:
    """Add the rows of a file to those that are kept.

    Returns:
        how many there are now.

    Raises:
        Act24Error: a row lacks what a run says of itself, or is there already.
    """
    rows, added = _read(file), _read(new)
    for row in added:
        missing = [key for key in NEEDED if key not in row]
        if missing or row["commit"] is None:
            raise Act24Error(f"{new}: row {row.get('name')!r} lacks {', '.join(missing) or 'its commit'}")
        if row | {"superseded": False} in rows:
            raise Act24Error(f"{new}: row {row['name']!r} of {row['commit']} is kept already")
        rows.append(row | {"superseded": False})
    with whole_file(file) as partial:
        partial.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return len(rows)


def _read(file: Path) -> list[dict[str, Any]]:
    with reading(f"cannot read {file}"):
        rows = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise Act24Error(f"{file}: expected a list of rows, as `act24 bench … --json` prints it")
    return rows


if __name__ == "__main__":
    with ends_in_one_line():
        for name in sys.argv[1:]:
            print(f"{keep(Path(name))} rows in {FILE}")
