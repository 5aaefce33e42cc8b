"""A study in words, for the person who is to approve it."""

from __future__ import annotations

import time
from collections.abc import Iterator

from medfl.client.budget import terms_of
from medfl.client.premises import Enrolment
from medfl.common import study_text
from medfl.common.coordination import Published
from medfl.common.signing import key_fingerprint
from medfl.common.site import Policy, Site
from medfl.common.study import Study

_TASKS = {
    "classification": "to tell images or records apart by class",
    "segmentation": "to outline structures in images",
    "risk": "to estimate the risk of an outcome from records",
}


def describe(
    study: Study,
    published: Published,
    enrolment: Enrolment,
    site: Site | None,
    before: Study | None = None,
) -> list[str]:
    """Who asks, what is computed, what leaves, under which privacy, how long; one line each.

    site: the hospital's own file, whose policy narrows what the study asks; None = not given.
    before: the last other study of this name, to say what has changed since.
    """
    lines = [
        *_who(study, published, enrolment),
        "",
        *_computed(study, site),
        "",
        *_leaves(study, site),
        *_summed_with(study, enrolment),
        "",
        *_privacy(study, site),
        "",
        *_changed(study, before),
        "All that acts, as the study says it (what is not named here is left open):",
        *(f"  {key} = {value}" for key, value in study_text.settings(study).items()),
    ]
    return [_printable(line) for line in lines]


def _from(study: Study, site: Site | None) -> Iterator[str]:
    """Which of several data sets the study gets."""
    if site is not None:
        for name in site.serving(study.name):
            data = site.data_sets[name]
            yield f"  From the data set {name} of site.toml ({data.format}, {data.path})."


def _printable(line: str) -> str:
    """A text of the study cannot begin a line of its own, nor send codes to the terminal."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)


def _changed(study: Study, before: Study | None) -> Iterator[str]:
    if before is not None:
        yield f"There was another study of this name ({before.digest[:12]}). This one differs in:"
        yield from (f"  {line}" for line in study_text.changes(before, study))
        yield ""


def _who(study: Study, published: Published, enrolment: Enrolment) -> Iterator[str]:
    yield f"{study.title or study.name}  ({study.name})"
    yield f"  digest: {published.digest}"
    yield (
        f"Who asks: the coordinator of {enrolment.federation}, on "
        f"{time.strftime('%Y-%m-%d', time.gmtime(published.at))}. The signature is right."
    )
    purpose = study.purpose.strip().rstrip(".") or "the study does not say"
    yield f"For what: {purpose}."


def _computed(study: Study, site: Site | None) -> Iterator[str]:
    task, training, federation = study.task, study.training, study.federation
    yield f"What is computed: a model ({study.model.name}) learns {_TASKS[task.kind]}."
    yield f"  Outcomes: {', '.join(task.classes)}."
    if study.image is not None:
        size = " x ".join(str(n) for n in study.image.size)
        yield f"  From images, prepared as {study.image.dimensions}-D arrays of {size}."
    yield from _from(study, site)
    if study.record is not None:
        yield f"  From record fields: {', '.join(f.name for f in study.record.features)}."
    amount = (
        f"{training.local_steps} optimiser steps"
        if training.local_steps is not None
        else f"{training.local_epochs} passes over the training cases"
    )
    yield (
        f"  Learning rate {training.learning_rate:g} ({training.optimiser}), batches of "
        f"{training.batch_size}."
    )
    yield (
        f"  {federation.rounds} rounds; in each, {amount} on this hospital's machine "
        f"({federation.strategy}). At least {federation.min_sites} hospitals must take part."
    )
    if site is not None and site.policy.evaluate_only:
        yield "  This hospital only evaluates (policy.evaluate_only): nothing is trained here, and"
        yield "  it is asked once, at the end, for metrics of the model on its cases."
    if federation.patience is not None:
        yield (
            f"  Training may end earlier: after {federation.patience} models in a row with no "
            f"better {federation.best_metric} on validation cases."
        )
    yield "  By the installed medfl alone: code that a coordinator sends is never run."
    if site is not None:
        runs = site.policy.runs_per_approval
        yield f"  An approval allows {runs} runs; in each, a question is answered once."


def _leaves(study: Study, site: Site | None) -> Iterator[str]:
    yield "What leaves this hospital:"
    if site is not None and site.policy.evaluate_only:
        names = ", ".join(study.evaluation.metrics or ["the task's usual ones"])
        private = terms_of(study, site.privacy) is not None
        noise = " with noise, at the study's price" if private else ""
        yield f"  once, at the end: metrics over all its cases ({names}){noise}, rounded to"
        yield f"  {site.policy.round_metrics_to} decimals."
        if not private:
            yield "  once, before training: how many cases, and how many left out for which reason."
        yield "What never leaves: images, records, file names, patients' names and numbers."
        return
    if terms_of(study, None if site is None else site.privacy) is None:
        yield from _leaves_plain(study, site)
    else:
        yield "  each round: the noised change of the weights, the declared number of cases,"
        yield "  and the privacy spent so far."
    if study.secure_aggregation is not None:
        least = max(study.federation.min_sites, 0 if site is None else site.policy.min_sum_sites)
        yield "  The change of the weights leaves under masks: the coordinator learns the sum over"
        yield f"  at least {least} hospitals and no single one's."
    yield "What never leaves: images, records, file names, patients' names and numbers."


def _summed_with(study: Study, enrolment: Enrolment) -> Iterator[str]:
    """Whose keys an approval would name."""
    if study.secure_aggregation is None:
        return
    yield "It may be summed with these hospitals and no others. Whoever invents hospitals can take"
    yield "their updates off the sum: compare the fingerprints by telephone (`medfl-client status`"
    yield "shows a hospital its own), or name whom you trust: medfl-client approve --with NAME."
    for name, key in sorted(enrolment.sites.items()):
        yield f"  {name}: {key_fingerprint(key)}"
    if not enrolment.sites:
        yield "  none is known here yet; medfl-client studies asks for them"


def _leaves_plain(study: Study, site: Site | None) -> Iterator[str]:
    decimals = "" if site is None else f", rounded to {site.policy.round_metrics_to} decimals"
    yield "  each round: the change of the model's weights, and how many cases trained it;"
    names = ", ".join(study.evaluation.metrics or ["the task's usual ones"])
    if study.secure_aggregation is None:
        yield "  each round: the mean training loss;"
        yield f"  each round and at the end: metrics over all cases of a part ({names}){decimals};"
    else:
        yield "  no metrics and no loss: they would tell what masks hide. They stay here."
    yield "  once, before training: counts by part and by reason for leaving cases out, and"
    if _asks_statistics(study):
        yield "  sums over the training cases that the hospitals share for one normalisation."
    else:
        yield "  class counts; no sums over images or record fields."
    if columns := _open_columns(study):
        least = (Policy() if site is None else site.policy).smallest_count
        yield f"  the words or codes in {', '.join(columns)}, as they are written, each that at"
        yield f"  least {least} patients have. Free text does not belong in these columns; a study"
        yield "  that states their levels needs none of them."


def _open_columns(study: Study) -> list[str]:
    """Categories whose levels come from the hospitals."""
    features = study.record.features if study.record is not None else []
    return [f.name for f in features if f.kind == "category" and f.levels is None]


def _asks_statistics(study: Study) -> bool:
    image = study.image is not None and study.image.intensity == "federated"
    record = study.record is not None and (
        study.record.scale == "federated"
        or any(f.kind == "category" and f.levels is None for f in study.record.features)
    )
    return image or record


def _privacy(study: Study, site: Site | None) -> Iterator[str]:
    asked, own = study.privacy, None if site is None else site.privacy
    if asked is None and own is None:
        yield "Privacy: no differential privacy. The weights' changes may tell something about"
        yield "  single patients to the coordinator. To insist on it: [privacy] in site.toml."
        yield from _whole_hospital(study)
        return
    terms = terms_of(study, own)
    if terms is None:
        return
    yield (
        f"Privacy: differential privacy with epsilon {terms.epsilon:g}, delta {terms.delta:g} "
        f"for the whole study, per training {terms.unit}."
    )
    if own is not None and (asked is None or own.epsilon < asked.epsilon):
        yield "  This is this hospital's own limit; the study asks for less protection or none."
    if terms.clip_quantile is not None:
        yield "  How long a gradient may be follows from this hospital's own, counted with noise;"
        yield "  that is within epsilon."
    yield from _whole_hospital(study)
    if terms.metrics_epsilon is None:
        yield "  No counts, losses or metrics of this hospital leave it."
    else:
        spent = f"{terms.metrics_epsilon:g}"
        yield f"  Metrics leave with noise, for epsilon {spent} of their patients."


def _whole_hospital(study: Study) -> Iterator[str]:
    if study.site_privacy is not None:
        asked = study.site_privacy
        yield (
            f"  The coordinator clips each hospital's update and puts noise on the sum: epsilon "
            f"{asked.epsilon:g}, delta {asked.delta:g} for a whole hospital, against whoever"
        )
        yield "  gets the models. The coordinator itself sees this hospital's updates without it."
