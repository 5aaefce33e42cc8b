"""What an update must satisfy before it touches the model; a bad one costs its site that round.

    opened     unpacked, where it declares exactly the parameters that were asked for
    fault_of   names, shapes, types, finite values, and a weight that was announced
    Proportion lengths, against the others' (`medfl.strategies.proportion`)
    cleaned    what a reply says beside its update

Every reason is one of a few fixed phrases: they are shown to people and written to logs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import replace

import numpy as np

from medfl.common.errors import FederationError
from medfl.common.messages import Instruction, Metrics, Reply
from medfl.common.packing import Kind, Shapes, is_packed, read_head, unpack
from medfl.common.tensors import Tensors, all_finite

# More cases than any hospital has: a weight beyond it is a fault or an attack, not a cohort.
MAX_CASES = 10_000_000
MAX_REASONS = 100

_PHRASE = re.compile(r"[A-Za-z' ]{1,60}")
_REASON = re.compile(r"[a-z0-9_-]{1,60}")
_DIGEST = re.compile(r"[0-9a-f]{64}")


def opened(
    update: Reply, asked: Instruction, travels: Collection[str], kind: Kind
) -> tuple[Reply, str | None]:
    """The update with plain parameters, or why it has none; what it holds is not judged yet.

    kind: what the study says updates travel as; a site cannot choose another.
    """
    if update.refusal:
        return update, update.refusal
    delta, why = _opened(update.delta, _shapes(asked.weights, travels), kind)
    if why is None:
        control, why = _opened(update.control, _shapes(asked.control, travels), "float32")
        if why is None:
            return replace(update, delta=delta, control=control), None
    return replace(update, delta={}, control={}), why


def fault_of(
    update: Reply, asked: Instruction, travels: Collection[str], announced: int = MAX_CASES
) -> str | None:
    """Why this update is not admitted, or None.

    travels: names of the parameters that the strategy lets leave a hospital. An update has exactly
        these: a mean over some sites' parameters and others' absence would be no mean.
    announced: training cases that the site had when the run began; its weight cannot grow.
    """
    if update.refusal:
        return update.refusal
    if not is_case_count(update.n_cases):
        return "case count out of range"
    if update.n_cases > announced:
        return "more cases than announced"
    controls = [name for name in asked.control if name in travels]
    return _fault(update.delta, asked.weights, travels) or _fault(
        update.control, asked.control, controls
    )


def is_case_count(number: object) -> bool:
    """Whether this can be a hospital's number of training cases."""
    return isinstance(number, int) and not isinstance(number, bool) and 1 <= number <= MAX_CASES


def cleaned(reply: Reply, metrics: Collection[str]) -> Reply:
    """The reply without what was not asked: other metrics, and texts that are no known phrase.

    A number stays as the site tells it, but one that is not finite is none, as where a metric is
    undefined; a text could tell anything to everybody who reads a report.
    """
    refusal = reply.refusal
    if refusal and not _PHRASE.fullmatch(refusal):
        refusal = "refused for a reason that is none"
    reasons = [(why, n) for why, n in reply.left_out.items() if _REASON.fullmatch(why) and n >= 0]
    return replace(
        reply,
        refusal=refusal,
        loss=_finite(reply.loss),
        metrics={part: _asked_for(values, metrics) for part, values in reply.metrics.items()},
        left_out=dict(reasons[:MAX_REASONS]),
        cohort=reply.cohort if _DIGEST.fullmatch(reply.cohort) else "",
    )


def _asked_for(values: Metrics, names: Collection[str]) -> dict[str, float | None]:
    return {name: _finite(value) for name, value in values.items() if name in names}


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _opened(group: Tensors, shapes: Shapes, kind: Kind) -> tuple[Tensors, str | None]:
    if kind == "float32" and not is_packed(group):
        return group, None
    try:
        head = read_head(group, shapes)
        why = _misfit(head.shapes, shapes)
        if why is None and head.kind != kind:
            why = "packed in another way than agreed"
        return ({}, why) if why else (unpack(group, shapes), None)
    except FederationError:
        return {}, "cannot be unpacked"


def _fault(group: Tensors, like: Tensors, names: Collection[str]) -> str | None:
    why = _misfit({name: a.shape for name, a in group.items()}, _shapes(like, names))
    if why:
        return why
    for array in group.values():
        if array.dtype != np.float32:
            return "parameter of another type"
        if not all_finite({"": array}):
            return "value that is not finite"
    return None


def _misfit(shapes: Shapes, wanted: Shapes) -> str | None:
    if shapes.keys() - wanted.keys():
        return "unknown parameter"
    if wanted.keys() - shapes.keys():
        return "missing parameter"
    if any(tuple(shapes[name]) != tuple(wanted[name]) for name in wanted):
        return "parameter of another shape"
    return None


def _shapes(like: Tensors, names: Collection[str]) -> Mapping[str, tuple[int, ...]]:
    return {name: a.shape for name, a in like.items() if name in names}
