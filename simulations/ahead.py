"""Pictures prepared for the cache while torch is imported, which takes one core seconds."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from medfl.common.errors import MedflError
from medfl.common.study import Study
from medfl.simulations.pool import forked
from medfl.simulations.sites import SimulatedHospital


@contextmanager
def reading_ahead(hospitals: Sequence[SimulatedHospital], study: Study) -> Iterator[None]:
    """Meanwhile another process reads one hospital after another and keeps them in the cache.

    What it has not finished by the end of the block is given up and leaves nothing; whoever needs
    it reads it. Errors are left to them as well.
    """
    if study.image is None or len(os.sched_getaffinity(0)) < 2:
        yield  # tables have no cache, and a single core has nothing to spare
        return
    with forked(lambda: _read(hospitals, study)) as child:
        try:
            yield
        finally:
            os.kill(child, signal.SIGTERM)


def _read(hospitals: Sequence[SimulatedHospital], study: Study) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Raised where it stands, so that a half-written entry is removed on the way out.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit())
    os.nice(5)
    logging.disable()
    for hospital in hospitals:
        with suppress(MedflError):
            hospital.cohort(study)
