"""Which engine a model gets: by what it is made of, never by the clock.

A choice by timing would differ between two processes of one simulation and change the last bits;
book-keeping was the faster one wherever both were measured (docs/dp-speed.md), so nothing is timed.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from torch import Tensor, nn

from medfl.client.training.dropout import Dropouts
from medfl.client.training.engines.bookkeeping import BookKeeping
from medfl.client.training.engines.engine import Bound, Engine, Loss, NotCoveredError
from medfl.client.training.engines.materialised import Materialised, per_record_gradients
from medfl.client.training.units import Gradients

log = logging.getLogger(__name__)


def engine_for(model: nn.Module, loss_of: Loss, dropouts: Dropouts | None = None) -> Engine:
    """Book-keeping where its rules cover the model, on the CPU, where they were measured.

    dropouts: the model's, while they drop by each record's own numbers.
    """
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    any_model = Materialised(parameters, per_record_gradients(model, loss_of, dropouts))
    devices = {p.device.type for p in model.parameters()}
    if devices != {"cpu"}:
        log.info("gradients by %s: measured on the CPU only are the others", any_model.name)
        return any_model
    try:
        first = BookKeeping(model, loss_of)
    except NotCoveredError as error:
        log.info("gradients by %s: %s", any_model.name, error)
        return any_model
    return _WithReserve(first, any_model)


class _WithReserve:
    """An engine, and another from the moment on in which the first cannot go on."""

    def __init__(self, first: Engine, reserve: Engine) -> None:
        self._engine, self._reserve = first, reserve
        log.info("gradients by %s", first.name)

    @property
    def name(self) -> str:
        """Of the one that works now."""
        return self._engine.name

    def clipped_sum(
        self, inputs: Tensor, targets: Tensor, sizes: Sequence[int], bound: Bound
    ) -> Gradients:
        """As `Engine.clipped_sum`."""
        try:
            return self._engine.clipped_sum(inputs, targets, sizes, bound)
        except NotCoveredError as error:
            self._engine = self._reserve
            log.info("gradients by %s: %s", self.name, error)
        return self._engine.clipped_sum(inputs, targets, sizes, bound)

    def total(self, inputs: Tensor, targets: Tensor) -> Gradients:
        """As `Engine.total`."""
        return self._engine.total(inputs, targets)
