"""The result of a run as lines of text: the metric of the headline, hospital by hospital."""

from __future__ import annotations

from medfl.server.report import words
from medfl.server.report.run import Run, SiteResult


def result_lines(run: Run) -> list[str]:
    """A table of each hospital's test part and of their mean, then of those that only evaluated;
    one sentence where nobody told."""
    metric = words.headline_metric(run)
    if metric is None:
        return ["No hospital told a metric of its test cases."]
    sites = run.federated.sites
    told = [s for s in sites if words.shows_metrics(s) and s.metrics.get(metric) is not None]
    rows = [
        ("hospital", "test cases", words.measure(metric).label, "ε"),
        *((s.name, words.count(s.n_test), _value(s, metric), _epsilon(s)) for s in sites),
        (
            f"mean over {len(told)} of {len(sites)}",
            "",
            words.value(metric, run.federated.mean.get(metric)),
            "",
        ),
        *(
            (f"{s.name} (external)", words.count(s.n_test), _value(s, metric), _epsilon(s))
            for s in run.external
        ),
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = [
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    if any(s.epsilon is not None and s.metrics.get(metric) is None for s in sites):
        lines.append(
            "Under differential privacy a hospital tells no counts, metrics only at a price."
        )
    return lines


def _epsilon(site: SiteResult) -> str:
    return "none" if site.epsilon is None else words.epsilon(site.epsilon)


def _value(site: SiteResult, metric: str) -> str:
    return words.value(metric, site.metrics.get(metric) if words.shows_metrics(site) else None)
