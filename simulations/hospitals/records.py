"""The records of one hospital's wards: a table of patients, and who came back within 30 days."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medfl.common.seeds import derive
from medfl.simulations.hospitals import tables
from medfl.simulations.hospitals.profiles import Hospital, Table

# Mean and standard deviation of each field over all hospitals, its plausible range, its decimals,
# and what one standard deviation adds to the log odds. Most of them say nothing about the outcome.
FIELDS: dict[str, tuple[float, float, tuple[float, float], int, float]] = {
    "age": (66.0, 13.0, (18.0, 105.0), 0, 0.9),  # years
    "systolic": (136.0, 19.0, (70.0, 230.0), 0, 0.0),  # mmHg
    "heart_rate": (80.0, 14.0, (35.0, 170.0), 0, 0.6),  # beats a minute
    "creatinine": (1.1, 0.35, (0.3, 4.0), 2, 1.1),  # mg/dl
    "haemoglobin": (13.2, 1.8, (6.0, 20.0), 1, -0.8),  # g/dl
    "sodium": (139.0, 3.5, (118.0, 160.0), 0, -0.6),  # mmol/l
    "crp": (18.0, 14.0, (0.0, 150.0), 1, 0.0),  # mg/l
    "albumin": (38.0, 5.0, (15.0, 60.0), 0, 0.0),  # g/l
    "bmi": (26.5, 4.5, (13.0, 60.0), 1, 0.0),  # kg/m2
    "potassium": (4.2, 0.5, (2.0, 7.5), 1, 0.0),  # mmol/l
    "glucose": (118.0, 35.0, (40.0, 500.0), 0, 0.0),  # mg/dl
    "leucocytes": (8.1, 2.6, (0.5, 40.0), 1, 0.0),  # 1000 per microlitre
    "platelets": (245.0, 70.0, (10.0, 900.0), 0, 0.0),  # 1000 per microlitre
    "bilirubin": (0.7, 0.3, (0.1, 15.0), 1, 0.0),  # mg/dl
    "days": (6.0, 3.0, (1.0, 40.0), 0, 0.7),  # in hospital
}


def write(hospital: Hospital, folder: Path, *, seed: int, small: bool) -> Table:
    """Write the table and return it; the small ones have enough patients for every part."""
    records = hospital.records
    n = records.small_patients if small else records.patients
    ids = tables.patient_numbers(hospital.number, n, derive(seed, hospital.name, "records"))
    values, outcomes = draw(hospital, seed, n)
    rows = [
        {
            "patient": number,
            "label": records.labels[int(outcome)],
            **{
                name: f"{value:.{decimals}f}"
                for (name, (*_, decimals, _weight)), value in zip(FIELDS.items(), row, strict=True)
            },
        }
        for number, row, outcome in zip(ids, values, outcomes, strict=True)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    tables.write(records.table, folder, rows)
    return records.table


def draw(hospital: Hospital, seed: int, n: int) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """(n, fields) values within their ranges, and (n,) outcomes, drawn from one logistic model.

    Hospitals differ in how old and how ill their patients are, not in what makes them come back.
    """
    rng = np.random.default_rng(derive(seed, hospital.name, "ward"))
    z = rng.normal(size=(n, len(FIELDS)))
    z[:, 0] += hospital.records.older_sd
    weights = np.array([weight for *_, weight in FIELDS.values()])
    log_odds = z @ weights + hospital.records.log_odds
    outcomes = rng.random(n) < 1 / (1 + np.exp(-log_odds))
    means, sds, ranges, *_ = zip(*FIELDS.values(), strict=True)
    low, high = np.array(ranges).T
    return np.clip(np.array(means) + z * np.array(sds), low, high), outcomes
