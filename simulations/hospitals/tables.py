"""A hospital's list of cases, in its own words, and the site.toml that explains them."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from medfl.simulations.hospitals.profiles import Hospital, Table

# One line of a table under the study's names: patient, and case, image, mask, label or fields.
Row = dict[str, str]


# About how many patients the hospital under privacy trains on, as it tells everybody.
DECLARED = 250


def patient_numbers(pattern: str, count: int, seed: int) -> list[str]:
    """Distinct patient numbers in the hospital's own pattern."""
    drawn = np.random.default_rng(seed).choice(90000, count, replace=False) + 10000
    return [pattern.format(number) for number in drawn]


def write(table: Table, folder: Path, rows: Sequence[Row]) -> None:
    """Write the table as CSV with the hospital's delimiter and column names."""
    with (folder / table.file).open("w", encoding="utf-8", newline="") as file:
        lines = csv.writer(file, delimiter=table.delimiter, lineterminator="\n")
        if table.header:
            lines.writerow(table.columns.values())
        lines.writerows([row[key] for key in table.columns] for row in rows)


def write_site(hospital: Hospital, table: Table, folder: Path, declared: int | None = None) -> Path:
    """Write site.toml next to the table; returns its path.

    declared: about how many patients it trains on, in a study where it works under its privacy.
    """
    quoted = json.dumps  # TOML's basic strings are JSON's, for text without control characters.
    columns = ", ".join(f"{key} = {quoted(name)}" for key, name in table.columns.items())
    lines = [
        f"# {hospital.institution}: a made-up hospital. Nobody in these files ever lived.",
        f"name = {quoted(hospital.name)}",
        'device = "cpu"',
        "",
        "[data]",
        *(
            ['format = "dicom"', 'path = "images"', f"table = {quoted(table.file)}"]
            if "image" in table.columns
            else ['format = "table"', f"path = {quoted(table.file)}"]
        ),
        "# The study's name = our name of the column.",
        f"columns = {{ {columns} }}",
    ]
    if table.delimiter != ",":
        lines.append(f"delimiter = {quoted(table.delimiter)}")
    if not table.header:
        lines += [
            "# The file has no first line with names; these are its columns.",
            f"header = {json.dumps(list(table.columns.values()))}",
        ]
    if "mask" in table.columns:
        lines.append('masks = "masks"')
    if hospital.privacy is not None and declared is not None:
        epsilon, delta = hospital.privacy
        lines += [
            "",
            "# This hospital trains under differential privacy, whatever the study asks.",
            "[privacy]",
            f"epsilon = {epsilon:g}",
            f"delta = {delta:g}",
            "# About how many patients it trains on: what others learn instead of the number.",
            f"declared_patients = {declared}",
            "# Of all studies together, ever.",
            "[privacy.budget]",
            "epsilon = 20",
            f"delta = {delta:g}",
        ]
    path = folder / "site.toml"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")
    return path
