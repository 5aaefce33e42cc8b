"""The sentences below the headline, and what bounds them. No numbers are made here."""

from __future__ import annotations

from medfl.server.report import words
from medfl.server.report.noticed import untrained
from medfl.server.report.run import Outcome, Run


def gains(run: Run, metric: str) -> tuple[int, int, int]:
    """Hospitals that gained, that lost, and that could be compared with training alone."""
    local = words.by_name(run.baselines["local"].sites)
    signs = [
        words.gained(metric, s.metrics.get(metric), local[s.name].metrics.get(metric))
        for s in run.federated.sites
        if s.name in local
    ]
    return signs.count(1), signs.count(-1), sum(s is not None for s in signs)


def summary(run: Run, metric: str | None) -> str:
    """The paragraph that a doctor or a coordinator reads if they read nothing else."""
    if metric is None:
        return "The run reports no metric on test cases, so nothing can be said about the model."
    parts = [
        _reached(run, metric),
        _outside(run, metric),
        _pooled(run, metric),
        _alone(run, metric),
    ]
    parts += [_others(run, metric), _privacy(run), _cost_of_privacy(run, metric)]
    return " ".join(part for part in parts if part)


def _reached(run: Run, metric: str) -> str:
    sites = run.federated.sites
    label = words.measure(metric).label
    if run.federated.pooled.get(metric) is None:
        number = words.value(metric, run.federated.mean.get(metric))
        told = sum(s.metrics.get(metric) is not None for s in sites)
        whole = "" if told == len(sites) else f", of {_hospitals(len(sites))} that took part"
        return (
            f"The federated model reached {label} {number} on test cases, as the mean over "
            f"{_hospitals(told)} that told it{whole}."
        )
    tests = words.total(s.n_test for s in sites)
    reached = _with_interval(run.federated, metric)
    where = f"over all {tests} test cases" if tests[0].isdigit() else f"over {tests} test cases"
    return f"The federated model reached {label} {reached} {where} of {_hospitals(len(sites))}."


def _outside(run: Run, metric: str) -> str:
    """External validation; also where no figure may be shown, since that is a result."""
    told = [
        f"{words.value(metric, s.metrics.get(metric))} at {s.name}"
        for s in run.external
        if words.shows_metrics(s, metric) and s.metrics.get(metric) is not None
    ]
    if not run.external:
        return ""
    label = words.measure(metric).label
    who = f"{_hospitals(len(run.external))} that took no part in training"
    return (
        f"In external validation, at {who}, it reached {label} {', '.join(told)}."
        if told
        else f"Of external validation, at {who}, no {label} can be shown."
    )


def _with_interval(outcome: Outcome, metric: str) -> str:
    pair = words.interval(metric, outcome.pooled_intervals.get(metric))
    number = words.value(metric, outcome.pooled.get(metric))
    return f"{number} (95 % interval {pair})" if pair else number


def _pooled(run: Run, metric: str) -> str:
    pooled = run.baselines.get("pooled")
    if pooled is None or pooled.pooled.get(metric) is None:
        return ""
    what = "images" if run.study.image is not None else "records"
    text = (
        f"Pooled training, which would have needed to move the {what} to one place, reached "
        f"{_with_interval(pooled, metric)}"
    )
    return f"{text}; {_overlap(run.federated, pooled, metric)}."


def _overlap(ours: Outcome, theirs: Outcome, metric: str) -> str:
    left, right = ours.pooled_intervals.get(metric), theirs.pooled_intervals.get(metric)
    if left is None or right is None:
        return "without intervals, chance cannot be told from difference"
    if left[0] <= right[1] and right[0] <= left[1]:
        return "the two intervals overlap, so chance may explain the difference"
    return "the two intervals lie apart"


def _alone(run: Run, metric: str) -> str:
    local = run.baselines.get("local")
    if local is None or local.mean.get(metric) is None:
        return ""
    won, lost, compared = gains(run, metric)
    text = (
        f"Averaged over hospitals, the federated model reached "
        f"{words.value(metric, run.federated.mean.get(metric))}, and a model that each hospital "
        f"trained alone {words.value(metric, local.mean.get(metric))}"
    )
    if not compared:
        return text + "."
    worse = f" and {lost} scored worse" if lost else ""
    apart = _apart(run, metric)
    clear = f", {apart or 'none'} of them with intervals apart" if won else ""
    return f"{text}; {won} of {compared} scored better with the federated model{clear}{worse}."


def _apart(run: Run, metric: str) -> int:
    """Hospitals that gained, and whose interval lies apart from that of training alone."""
    local = words.by_name(run.baselines["local"].sites)
    count = 0
    for site in run.federated.sites:
        alone = local.get(site.name)
        pair = site.intervals.get(metric), alone.intervals.get(metric) if alone else None
        if alone is None or pair[0] is None or pair[1] is None:
            continue
        better = words.gained(metric, site.metrics.get(metric), alone.metrics.get(metric)) == 1
        count += better and (pair[0][0] > pair[1][1] or pair[1][0] > pair[0][1])
    return count


def _others(run: Run, metric: str) -> str:
    parts = [
        f"{words.way(name)} reached {words.value(metric, outcome.pooled.get(metric))}"
        for name, outcome in run.baselines.items()
        if name not in ("local", "pooled", "no_privacy") and outcome.pooled.get(metric) is not None
    ]
    return f"For comparison, {', '.join(parts)}." if parts else ""


def _privacy(run: Run) -> str:
    private, whole = run.epsilons, run.site_epsilon
    together = f"Whole hospitals are protected with ε of at most {words.epsilon(whole)}."
    if not private:
        return "No differential privacy was used." if whole is None else together
    largest = words.epsilon(max(private.values()))
    every = private.keys() | words.by_name(run.federated.sites).keys()
    who = (
        "All hospitals"
        if len(private) == len(every)
        else f"{len(private)} of {_hospitals(len(every))}"
    )
    said = f"{who} trained under differential privacy, with ε of at most {largest}."
    return said if whole is None else f"{said} {together}"


def _cost_of_privacy(run: Run, metric: str) -> str:
    """What the same run reached without anybody's privacy, where that was trained as well."""
    without = run.baselines.get("no_privacy")
    if without is None or without.pooled.get(metric) is None:
        return ""
    cost = words.gained(metric, without.pooled.get(metric), run.federated.pooled.get(metric))
    said = "that is what privacy cost here" if cost == 1 else "privacy cost nothing here"
    return (
        f"The same training without privacy reached {_with_interval(without, metric)}: {said}; "
        f"{_overlap(run.federated, without, metric)}."
    )


def privacy_words(run: Run) -> list[str]:
    """What ε covers and what it does not, a paragraph each; never more than was done."""
    if not run.epsilons and run.study.site_privacy is not None:
        return ["No hospital trained under differential privacy of its own patients."]
    if not run.epsilons:
        what = "images" if run.study.image is not None else "records"
        return [
            f"No differential privacy was used. The {what} stayed at the hospitals, but nothing "
            "bounds how much the trained model may reveal about single training patients: "
            "treat the model's weights as confidential."
        ]
    unit = run.study.privacy.unit if run.study.privacy else "patient"
    open_sites = len(run.federated.sites) - len(run.private_sites)
    parts = [
        f"ε bounds how much the trained model can depend on any one training {unit}: whoever "
        f"sees every model of this study can raise the odds of a right guess about whether a "
        f"given {unit} was trained on by at most a factor of e to the power of ε, except with "
        "probability δ. Smaller is stronger; an ε above about 10 promises little.",
        "The protected unit is one patient with all images and records."
        if unit == "patient"
        else "The protected unit is one record. A patient with several of them is protected less: "
        "for k of them, ε is k times as large.",
        _not_covered(run),
        "Each hospital's ε speaks for its own patients. A patient who is in the data of two "
        "hospitals bears the sum of both.",
    ]
    if open_sites:
        parts.append(
            f"{_hospitals(open_sites)} of this run trained without differential privacy; their "
            "patients have no such bound."
        )
    return parts


def site_privacy_words(run: Run) -> str:
    """What the coordinator's noise on the sum covers; nothing without [site_privacy]."""
    privacy, epsilon = run.study.site_privacy, run.site_epsilon
    if privacy is None or epsilon is None:
        return ""
    bound = f"ε of {words.epsilon(epsilon)} at δ of {words.small_number(privacy.delta)}"
    return (
        f"Whole hospitals: {bound} bounds how much the models can depend on everything that one "
        "hospital sent, and so on any one of its patients, for whoever gets the models. It does "
        "not protect a hospital from the coordinator, which received its updates as they were, "
        "nor what this report says of single hospitals; who took part is no secret."
    )


def _not_covered(run: Run) -> str:
    price = run.study.privacy.metrics_epsilon if run.study.privacy else None
    told = (
        "told the coordinator no metric and no count of cases"
        if price is None
        else f"told the coordinator metrics with noise, at ε {price:g} for each validation or test "
        "patient, and no count of cases"
    )
    if run.between_hospitals:
        return f"ε covers training, and training patients. Private hospitals {told}."
    return (
        f"ε covers training, and training patients. While it lasted, private hospitals {told}. The "
        "results in this report are computed from their test cases without noise, by who may see "
        "those; they are not covered."
    )


def limits(run: Run) -> list[str]:
    """What a reader must not conclude."""
    lines = [
        "Intended for research. This is not a medical device and must not guide the care of a "
        "patient.",
        *_few_cases(run),
        "Each hospital computed its metrics and told only those: there are no intervals, and the "
        "mean over hospitals is not that over patients. Training at each hospital alone was not "
        "tried."
        if run.between_hospitals
        else "Intervals come from resampling the test patients. They say how much the result "
        "depends on who was tested, not how it would change with new training, other scanners or "
        "other hospitals.",
        _new_hospitals(run),
        "Not checked: fairness between groups of patients, robustness to poor images, agreement "
        "between human readers, and the benefit to any clinical decision.",
    ]
    if run.between_hospitals and run.study.secure_aggregation is not None:
        lines.append(
            "Updates were summed under masks. So that nothing else gives a hospital away, none "
            "told a loss or a metric of its own (but with noise, where the study states a price); "
            "each can evaluate the model on its own cases. Single updates were not seen, and none "
            "could be left out for its length or direction."
        )
    if run.chosen_by_metric:
        lines.append(
            "The published round was chosen on validation cases; the test cases took no part."
        )
    if run.study.simulation is not None and not run.between_hospitals:
        lines.append(
            "This was a simulation: one machine played all the hospitals with a public data set."
        )
    return lines


def _few_cases(run: Run) -> list[str]:
    tests = [s.n_test for s in run.federated.sites if s.n_test is not None]
    few = sum(n < 50 for n in tests)
    if not few:
        return []
    return [
        f"{few} of {_hospitals(len(tests))} tested on fewer than 50 cases; their own figures "
        "are rough, and comparing such hospitals with each other is not sound."
    ]


def _new_hospitals(run: Run) -> str:
    new = [*(site.name for site in untrained(run)), *(site.name for site in run.external)]
    if not new:
        return (
            "Every hospital in the test also took part in training. How the model does at a "
            "hospital that did not was not measured."
        )
    return (
        f"{', '.join(new)} took no part in training: figures there say how the model does at a "
        "hospital that is new to it. The other hospitals in the test took part."
    )


def _hospitals(n: int) -> str:
    return f"{n} hospital" if n == 1 else f"{n} hospitals"
