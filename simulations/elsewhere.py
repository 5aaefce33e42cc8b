"""Models that hospitals trained alone, tried on the other hospitals' test cases."""

from __future__ import annotations

from medfl.client.encoding import case_set
from medfl.client.evaluate import score
from medfl.client.hospital import OWN_MODEL
from medfl.common import tensors
from medfl.common.metrics import default_metrics, needs_distances, summarise
from medfl.common.records import columns
from medfl.server.rounds import Outcome
from medfl.simulations.sites import SimulatedRun

# Each model is tried at each hospital: beyond so many the matrix is neither read nor soon done.
MOST = 12


def elsewhere(run: SimulatedRun, outcome: Outcome) -> dict[str, dict[str, dict[str, float | None]]]:
    """Metrics without distances, by whose model and by whose test cases; none of many hospitals."""
    from medfl.common.models import build_model
    from medfl.common.models.weights import set_weights

    study, shared = run.study, outcome.shared
    there = {reply.site for reply in outcome.final}
    files = {n: run.folder / "sites" / n / OWN_MODEL for n in run.names if n in there}
    weights = {name: tensors.load(file) for name, file in files.items() if file.exists()}
    if len(weights) > MOST:
        return {}
    names = study.evaluation.metrics or default_metrics(study.task)
    names = [name for name in names if not needs_distances([name])]
    n_features = len(columns(study.record, shared)) if study.record is not None else None
    model = build_model(study, shared, n_features=n_features, seed=0).to(run.device)
    found: dict[str, dict[str, dict[str, float | None]]] = {name: {} for name in weights}
    for node, where in enumerate(run.names, start=1):
        if where not in there:
            continue
        cases = case_set(study, shared, run.hospital(node).cohort, "test")
        for whose, own in weights.items() if len(cases) else ():
            set_weights(model, own)
            scores = score(model, cases, study, run.device, distances=False)
            found[whose][where] = summarise(study.task, scores, names)
    return found
