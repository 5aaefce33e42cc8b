"""What this hospital will refuse of a study, with the remedy: asked before anybody signs, and again
at every question. One list of rules, so that what is foreseen is what is done."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from medfl.client import budget
from medfl.client.budget import Terms
from medfl.client.ledger import Ledger
from medfl.common.errors import MedflError
from medfl.common.messages import Part
from medfl.common.site import Policy, Site, SitePrivacy
from medfl.common.study import Study


def by_policy(study: Study, policy: Policy, terms: Terms | None) -> Iterator[str]:
    """What forbids the study whatever the data are. terms: under which it would be trained."""
    if study.task.kind not in policy.tasks:
        yield (
            f"policy.tasks of this site does not have {study.task.kind!r}. Whoever is responsible "
            "may add it to policy.tasks in site.toml."
        )
    if policy.require_secure_aggregation and study.secure_aggregation is None:
        yield (
            "This site's policy requires secure aggregation, and the study has no "
            "[secure_aggregation]: the coordinator would see this hospital's update. Ask the "
            "coordinator for a study with it."
        )
    if policy.evaluate_only:
        yield from _by_silence(study, terms)
    if terms is not None:
        yield from _said(lambda: budget.refuse_undeclared(terms))
        yield from _said(lambda: budget.refuse_unprotected(study))


def taking_part(policy: Policy) -> Part:
    """The part whose cases a hospital takes part with."""
    return "test" if policy.evaluate_only else "train"


def _by_silence(study: Study, terms: Terms | None) -> Iterator[str]:
    """Why a hospital that only evaluates would have nothing to say."""
    if study.secure_aggregation is not None:
        yield (
            "This hospital only evaluates (policy.evaluate_only), and under [secure_aggregation] "
            "no hospital tells metrics of its own. Evaluate the published model here instead."
        )
    elif terms is not None and terms.metrics_epsilon is None:
        yield (
            "This hospital only evaluates (policy.evaluate_only) and is private, and the study "
            "states no price for metrics. Ask the coordinator for privacy.metrics_epsilon, or "
            "evaluate the published model here."
        )


def by_size(
    policy: Policy, smallest: int, patients: Sequence[str], terms: Terms | None
) -> Iterator[str]:
    """Too few to take part. smallest: number spoken of.

    patients: of each training case, or test case where the hospital only evaluates.

    Under privacy (terms) the declared numbers decide: whether the hospital refuses would else tell
    of the one patient who makes the difference.
    """
    n_cases, n_patients = len(patients), len(set(patients))
    if terms is not None:
        n_cases, n_patients = terms.n_cases or 0, terms.n_units or 0
    what = "test" if policy.evaluate_only else "training"
    if n_cases < policy.min_cases:
        yield (
            f"{n_cases} {what} cases, and this site's policy asks for at least "
            f"{policy.min_cases} (policy.min_cases)."
        )
    if n_patients < smallest:
        yield (
            f"{n_patients} {what} patients, and this site's policy speaks of no fewer "
            f"than {smallest} (policy.smallest_count)."
        )


def by_budget(
    site: Site, study: Study, terms: Terms | None, patients: Callable[[Part], Sequence[str]]
) -> Iterator[str]:
    """What a whole run of the study would cost, where the ledger has no room for it."""
    if terms is not None and terms.n_units is not None:
        ledger = Ledger(site.ledger)

        def fits() -> None:
            uses = budget.whole_study(study, terms, "foreseen", patients)
            budget.refuse_too_much(ledger, terms, uses)

        yield from _said(fits)


def by_site(study: Study, site: Site) -> list[str]:
    """What site.toml alone refuses, before the data are looked at."""

    def has_data() -> None:
        site.of_study(study.name)

    return [*_said(has_data), *without_data(study, site.policy, site.privacy)]


def without_data(study: Study, policy: Policy, privacy: SitePrivacy | None) -> list[str]:
    """What can be said before the data are looked at."""
    return list(by_policy(study, policy, budget.terms_of(study, privacy)))


def _said(rule: Callable[[], None]) -> Iterator[str]:
    try:
        rule()
    except MedflError as error:
        yield str(error)
