"""The tables and key figures of the report and the model card, as rows of text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from medfl.server.average import first_averaged
from medfl.server.report import curves, words
from medfl.server.report.plot import MANY
from medfl.server.report.run import Outcome, Run, SiteResult

# Metrics in the table by hospital that is always open; more would not fit on paper.
COLUMNS = 4
EMPTY_MASKS = (
    "Dice and distances are over cases whose truth has the structure (missed wholly: Dice 0, no "
    "distance); of the others, the share where the model marks something is the false positives."
)
_MACHINE = ("device", "cpus", "workers")


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of text; the first cell of a row is its header. notes: second line of a cell."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[tuple[str, str]]]
    folded: bool = False


def ways(run: Run) -> dict[str, Outcome]:
    """The federated model first, then the baselines, by their names in a table."""
    strategy = str(run.facts.get("strategy") or run.study.federation.strategy)
    return {
        f"Federated ({strategy})": run.federated,
        **{words.way(name): outcome for name, outcome in run.baselines.items()},
    }


def cards(run: Run, metric: str | None) -> list[tuple[str, str, str]]:
    """Key figures: (label, figure, note)."""
    sites = run.federated.sites
    found: list[tuple[str, str, str]] = []
    if metric is not None:
        pair = words.interval(metric, run.federated.pooled_intervals.get(metric))
        pooled = run.federated.pooled.get(metric)
        number = words.value(metric, pooled)
        note = f"95 %: {pair}" if pair else "over all test cases"
        if pooled is None:
            number = words.value(metric, run.federated.mean.get(metric))
            note = "mean over hospitals"
        found.append((words.measure(metric).label, number, note))
        shown = curves.ranked(run.federated, metric)
        if len(shown) > 1:
            low, high = (words.value(metric, shown[i].metrics.get(metric)) for i in (-1, 0))
            found.append(("Weakest hospital", low, f"strongest {high}"))
    rounds = run.facts.get("ended_after") or run.facts.get("rounds")
    found.append(("Hospitals", str(len(sites)), f"{rounds} rounds"))
    trained = words.total(s.n_train for s in sites)
    tested = words.total(s.n_test for s in sites)
    note = "test cases: few, or not told" if tested == words.NONE else f"tested on {tested}"
    found.append(("Training cases", trained, note))
    private = [s.epsilon or 0.0 for s in run.private_sites]
    found.append(
        ("Largest ε", words.epsilon(max(private)), f"at {len(private)} of {len(sites)} hospitals")
        if private
        else ("Privacy loss ε", "no bound", "no differential privacy")
    )
    if run.site_epsilon is not None:
        found.append(("ε of a whole hospital", words.epsilon(run.site_epsilon), "on the sum"))
    return found


def comparison(run: Run) -> Table:
    """Each metric by each way of training, over all test cases."""
    trained = ways(run)
    metrics = list(dict.fromkeys(m for o in trained.values() for m in o.pooled))
    rows = [
        [(words.measure(m).label, ""),
         *((words.value(m, o.pooled.get(m)), words.interval(m, o.pooled_intervals.get(m)))
           for o in trained.values())]
        for m in metrics
    ]  # fmt: skip
    text = "Over all test cases of all hospitals, with 95 % intervals."
    if run.study.task.kind == "segmentation":
        text += f" {EMPTY_MASKS}"
    if any(m.startswith(words.DISTANCES) for m in metrics):
        text += " Distances are in millimetres, or in voxels where images carry no spacing."
    if lower := [words.measure(m).label for m in metrics if not words.measure(m).larger_is_better]:
        text += f" Less is better for: {', '.join(lower)}."
    return Table(text, ["Metric", *trained], rows)


def mean_table(run: Run) -> Table:
    """Each metric by each way of training, as the mean over hospitals."""
    trained = ways(run)
    metrics = list(dict.fromkeys(m for o in trained.values() for m in o.mean))
    whose = {words.over(o, m) for o in trained.values() for m in metrics}
    alike = len(whose) == 1  # then it is said once, and not in every cell
    rows = [
        [(words.measure(m).label, ""),
         *((words.value(m, o.mean.get(m)), "" if alike else words.over(o, m))
           for o in trained.values())]
        for m in metrics
    ]  # fmt: skip
    text = (
        f"Mean over {whose.pop() if alike else 'hospitals'}: every hospital that has the metric "
        "counts the same, however many cases it tested."
    )
    if run.study.task.kind == "segmentation":
        text += f" {EMPTY_MASKS}"
    return Table(text, ["Metric", *trained], rows)


def site_tables(run: Run, metric: str | None) -> list[Table]:
    """Hospitals by the headline metric and a few more; where there are more, all in a second."""
    metrics = list(dict.fromkeys(m for s in run.federated.sites for m in s.metrics))
    if metric in metrics:
        metrics = [metric, *(m for m in metrics if m != metric)]
    local = words.by_name(run.baselines["local"].sites) if "local" in run.baselines else {}
    many = len(run.federated.sites) > MANY
    text = "On each hospital's own test cases, with 95 % intervals."
    if run.between_hospitals:
        text = f"On each hospital's own test cases. {words.NONE}: the hospital does not tell."
    tables = [_site_table(run, metrics[:COLUMNS], local, metric, text, many)]
    if len(metrics) > COLUMNS:
        whole = "Every other metric on each hospital's own test cases."
        tables.append(_site_table(run, metrics[COLUMNS:], {}, None, whole, True))
    if metric is not None and "local" in run.baselines and run.baselines["local"].elsewhere:
        tables.append(_elsewhere_table(run, metric))
    return tables


def external_table(run: Run, metric: str | None) -> Table | None:
    """What the model reached where nobody trained it; None where no hospital only evaluated."""
    if not run.external:
        return None
    metrics = list(dict.fromkeys(m for s in run.external for m in s.metrics))
    if metric in metrics:
        metrics = [metric, *(m for m in metrics if m != metric)]
    rows = [
        [(site.name, ""), (_n_test(site), ""), *(_cell(site, m) for m in metrics)]
        for site in run.external
    ]
    text = "Hospitals that only evaluated: they trained nothing, and are in no mean and no total."
    return Table(text, ["Hospital", "Test cases", *(words.measure(m).label for m in metrics)], rows)


def _n_test(site: SiteResult) -> str:
    if site.n_test is None:
        return words.NONE
    return str(site.n_test) if site.n_test >= words.SMALL else f"under {words.SMALL}"


def _elsewhere_table(run: Run, metric: str) -> Table:
    """Who trained alone, on the test cases of all: a model is to serve more than its own house."""
    where = run.federated.sites
    found = run.baselines["local"].elsewhere

    def cell(site: SiteResult, number: float | None) -> tuple[str, str]:
        shown = words.shows_metrics(site, metric)
        return (words.value(metric, number) if shown else "too few", "")

    rows = [[("Federated model", ""), *(cell(s, s.metrics.get(metric)) for s in where)]]
    rows += [
        [(f"Trained at {whose}", ""), *(cell(s, tested.get(s.name, {}).get(metric)) for s in where)]
        for whose, tested in found.items()
    ]
    text = f"{words.measure(metric).label} of each hospital's own model on every hospital's cases."
    return Table(text, ["Model", *(f"Tested at {s.name}" for s in where)], rows)


def _site_table(
    run: Run,
    metrics: Sequence[str],
    local: Mapping[str, SiteResult],
    metric: str | None,
    text: str,
    folded: bool,
) -> Table:
    head, rows = ["Hospital"], [[(site.name, "")] for site in run.federated.sites]
    for m in metrics:
        head.append(words.measure(m).label)
        for row, site in zip(rows, run.federated.sites, strict=True):
            row.append(_cell(site, m))
        if m == metric and local:
            head.append(f"{words.measure(m).label}, alone")
            for row, site in zip(rows, run.federated.sites, strict=True):
                alone = local.get(site.name)
                row.append(_cell(alone, m) if alone is not None else (words.NONE, ""))
    return Table(text, head, rows, folded)


def _cell(site: SiteResult, metric: str) -> tuple[str, str]:
    if not words.shows_metrics(site, metric):
        return ("too few", "")
    number = words.value(metric, site.metrics.get(metric))
    return (number, words.interval(metric, site.intervals.get(metric)))


def privacy_table(run: Run) -> Table:
    """ε and δ of every hospital."""
    rows = [
        [(s.name, ""), (words.epsilon(s.epsilon) if s.epsilon is not None else "no bound", ""),
         (words.small_number(s.delta), "")]
        for s in run.federated.sites
    ]  # fmt: skip
    caption = "Spent over the whole study; ε is rounded up."
    return Table(caption, ["Hospital", "ε", "δ"], rows, folded=len(rows) > MANY)


def data_table(run: Run) -> Table:
    """Cases used and left out at every hospital, small counts masked."""
    sites = run.federated.sites
    reasons = sorted({r for s in sites for r in s.quarantined})
    columns: list[tuple[str, Callable[[SiteResult], int | None]]] = [
        ("Training", lambda s: s.n_train),
        ("Validation", lambda s: s.n_validation),
        ("Test", lambda s: s.n_test),
        *((f"Left out: {words.reason(r)}", _quarantined(r)) for r in reasons),
    ]
    rows = [[(s.name, ""), *((words.count(f(s)), "") for _, f in columns)] for s in sites]
    rows.append([("All hospitals", ""), *((words.total(map(f, sites)), "") for _, f in columns)])
    left = "" if reasons else " No case was left out."
    if any(s.n_train is None for s in sites):
        left = f" {words.NONE}: the hospital does not tell."
    caption = f"Cases, split by patient. Counts from 1 to {words.SMALL - 1} show as <{words.SMALL}."
    return Table(caption + left, ["Hospital", *(name for name, _ in columns)], rows,
                 folded=len(sites) > MANY)  # fmt: skip


def _quarantined(reason: str) -> Callable[[SiteResult], int | None]:
    """Cases of a site left out for a reason; who does not tell its cases does not tell these."""
    return lambda site: None if site.n_train is None else site.quarantined.get(reason, 0)


def made(run: Run) -> list[tuple[str, str]]:
    """How the model was made: (what, value)."""
    facts, study = run.facts, run.study
    per_round = facts.get("bytes_per_round")
    environment: Mapping[str, Any] = facts.get("environment") or {}
    parameters = facts.get("n_parameters")
    lines = [
        ("Study", study.name),
        ("Task", f"{study.task.kind}: {', '.join(study.task.classes)}"),
        ("Model", study.model.name + (f", {parameters:,} parameters" if parameters else "")),
        ("Strategy", str(facts.get("strategy") or study.federation.strategy)),
        ("Rounds", _rounds(run)),
        ("Local training", _local_training(run)),
        ("Seed", str(facts.get("seed", words.NONE))),
        ("Traffic", f"{words.size(per_round)} a round, all hospitals together{_split(facts)}"),
        ("Duration", words.duration(facts.get("seconds"))),
        ("Date", str(facts.get("date", words.NONE))),
        ("Versions", ", ".join(f"{k} {environment[k]}" for k in environment if k not in _MACHINE
                               if environment.get(k))),
        ("Machine", ", ".join(f"{k} {environment[k]}" for k in _MACHINE
                              if environment.get(k) is not None)),
    ]  # fmt: skip
    return [(what, text) for what, text in lines if text]


def _split(facts: Mapping[str, Any]) -> str:
    down, up = facts.get("bytes_down_per_round"), facts.get("bytes_up_per_round")
    if down is None or up is None:
        return ""
    return f": {words.size(down)} to them, {words.size(up)} from them"


def waiting_table(run: Run) -> Table | None:
    """Who was waited for, by hospital; None where nobody was asked over a network."""
    rounds = [r for r in run.rounds if r.run == "main" and r.trained and r.answered]
    if not rounds:
        return None
    names = sorted({name for r in rounds for name in r.answered})
    last: dict[str, int] = {}
    for line in rounds:
        known = {name: s for name, s in line.answered.items() if s is not None}
        slowest = max(known, key=lambda name: (known[name], name))
        last[slowest] = last.get(slowest, 0) + 1
    rows = []
    for name in names:
        waited = [s for r in rounds if (s := r.answered.get(name)) is not None]
        own = [s for r in rounds if (s := r.site_seconds.get(name))]
        rows.append(
            [
                (name, ""),
                (f"{median(waited):.1f}", f"most {max(waited):.1f}"),
                (f"{median(own):.1f}" if own else words.NONE, ""),
                (f"{last.get(name, 0)} of {len(rounds)}", ""),
            ]
        )
    text = (
        "Seconds from a round's question to the whole answer, or until it was given up, and of "
        "these the hospital's own work, as medians over the rounds. "
        f"{words.NONE}: it does not tell."
    )
    head = ["Hospital", "Answer after, s", "Own work, s", "Waited for longest in"]
    return Table(text, head, rows, folded=True)


def _rounds(run: Run) -> str:
    rounds, chosen = run.facts.get("rounds"), run.facts.get("selected_round")
    how = run.study.federation
    void = sum(r.void for r in run.rounds if r.run == "main")
    after = run.facts.get("ended_after")
    rounds = rounds if after is None else f"{after} of {rounds}"
    rounds = f"{rounds} ({void} void, with too few answers)" if void else rounds
    if chosen is None:
        return str(rounds)
    if how.keep == "average":
        first = first_averaged(run.study.federation.rounds)
        return f"{rounds}; the published model is the mean of those of rounds {first} to {chosen}"
    why = "the last"
    if run.chosen_by_metric:
        why = f"best {words.measure(how.best_metric or '').label}"
    elif how.keep == "best":
        why = f"the last: no hospital could measure {words.measure(how.best_metric or '').label}"
    return f"{rounds}; the published model is that of round {chosen} ({why})"


def _local_training(run: Run) -> str:
    t = run.study.training
    amount = _plural(t.local_steps, "step") if t.local_steps else _plural(t.local_epochs, "epoch")
    text = f"{amount} a round, batch {t.batch_size}, {t.optimiser}, learning rate "
    return f"{text}{t.learning_rate:g}, loss {words.reason(t.loss)}"


def _plural(n: int | None, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def digest_table(run: Run) -> Table:
    """SHA-256 digests by which files and cohorts can be recognised."""
    digests: Mapping[str, str] = run.facts.get("digests") or {}
    named = {"study": run.facts.get("digest") or run.study.digest, **digests}
    rows = [[(what, ""), (str(digest), "")] for what, digest in named.items()]
    cohorts: Mapping[str, str] = run.facts.get("cohorts") or {}
    rows += [[(f"cohort {site}", ""), (str(d), "")] for site, d in cohorts.items()]
    return Table("Digests (SHA-256)", ["What", "Digest"], rows, folded=True)
