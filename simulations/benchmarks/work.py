"""The benchmarks' study and hospitals as files: `medfl.simulations.benchmarks.plain` as medfl's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from medfl.common.study import Study, load_study
from medfl.common.tensors import Array
from medfl.simulations.benchmarks.plain import FEATURES, LEARNING_RATE, table

SEED = 42
# Units of the two hidden layers: megabytes of float32 -> units.
HIDDEN = {0.03: 84, 1.0: 500, 10.0: 1579, 100.0: 4997}

_STUDY = """
name = "benchmark"
[task]
kind = "risk"
classes = ["no", "yes"]
[record]
scale = "none"
features = [{features}]
[model]
name = "mlp"
options = {{ hidden = [{hidden}, {hidden}] }}
[training]
learning_rate = {rate}
batch_size = 4096
local_steps = 1
[federation]
rounds = {rounds}
strategy = "fedavg"
min_sites = {sites}
[evaluation]
split = "hash"
test = 0.0
validation = 0.0
"""


@dataclass(frozen=True, slots=True)
class Work:
    """One size. megabytes: of the model, a key of HIDDEN."""

    megabytes: float
    rounds: int
    sites: tuple[str, ...]

    def write_study(self, path: Path) -> Study:
        """The study file."""
        text = _STUDY.format(
            features=", ".join(f'{{ name = "{f}" }}' for f in FEATURES),
            hidden=HIDDEN[self.megabytes],
            rate=LEARNING_RATE,
            rounds=self.rounds,
            sites=len(self.sites),
        )
        path.write_text(text, encoding="utf-8")
        return load_study(path)


def write_hospital(folder: Path, name: str, site: int) -> Path:
    """Its table and site.toml; returns the latter."""
    folder.mkdir(parents=True)
    rows = [",".join(["patient", *FEATURES, "label"])]
    for k, (row, label) in enumerate(zip(*table(site), strict=True)):
        rows.append(",".join([f"p{k}", *(f"{x:.3f}" for x in row), "yes" if label else "no"]))
    (folder / "cases.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    file = folder / "site.toml"
    file.write_text(
        f'name = "{name}"\n[data]\nformat = "table"\npath = "cases.csv"\n[cache]\npath = "cache"\n',
        encoding="utf-8",
    )
    return file


def first_weights(study: Study) -> dict[str, Array]:
    """The model that round 1 starts from."""
    from medfl.common.models import build_model
    from medfl.common.models.weights import get_weights
    from medfl.common.seeds import derive
    from medfl.common.statistics import Shared

    seed = derive(SEED, "weights")
    return get_weights(build_model(study, Shared(), n_features=len(FEATURES), seed=seed))
