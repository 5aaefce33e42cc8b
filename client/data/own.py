"""A real hospital's cohort: its keys are its own secret, and withdrawn patients are left out."""

from __future__ import annotations

import os
from typing import Any

from medfl.client.data.cases import Cohort
from medfl.client.data.cohort import Examined, build_cohort, examine
from medfl.client.data.withdrawn import withdrawn_among
from medfl.client.deid.keys import cases_key, load_secret, secret_path
from medfl.common.site import Site
from medfl.common.study import Study


def own_cohort(site: Site, study: Study) -> Cohort:
    """What this hospital trains on. The check shows, and an approval names, the same digest.

    Raises:
        PolicyRefused: no data set of the site is for this study.
        DataError: the data cannot serve the study.
        StorageError: the cache or the secret cannot be read or written.
    """
    source = site.of_study(study.name).source
    return build_cohort(source, study, n_jobs=cores(), **_own(site))


def examined(
    site: Site, study: Study, n_jobs: int | None = None, details: bool = False
) -> Examined:
    """`own_cohort` that collects what is wrong instead of stopping at it.

    n_jobs: cases prepared at the same time; None: one a core. details: as `examine`.
    """
    source = site.of_study(study.name).source
    return examine(source, study, n_jobs=n_jobs or cores(), details=details, **_own(site))


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def _own(site: Site) -> dict[str, Any]:
    secret = load_secret(secret_path(site))
    return {
        "cache": site.cache,
        "site_key": cases_key(secret),
        # Batches follow this order, and a simulation of the same hospitals has to follow it too.
        "order": site.name.encode(),
        "withdrawn": withdrawn_among(site, secret),
        "test_only": site.policy.evaluate_only,
    }
