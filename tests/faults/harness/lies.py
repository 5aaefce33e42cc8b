"""A hospital with valid keys that answers badly: what its trainer makes of the sound answer.

A plan file says how, by round ({"2": {"how": ..., ...}}); it is read at each answer, so that one
process tells many lies, and the truth where there is none.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

Change = Callable[[dict[str, Any]], dict[str, Any]]


def update(file: str) -> None:
    """Patch the trainer: its answers, their packing, their seals, their records."""
    from medfl.client import flower
    from medfl.client.approved import Approved

    answer, pack, to_record, seal = flower.answer, flower.pack, flower.to_record, Approved.seal
    last: list[Any] = []

    def plan(kind: str, round_: int) -> dict[str, Any]:
        try:
            made: dict[str, Any] = json.loads(Path(file).read_text()) if kind == "round" else {}
        except (OSError, ValueError):
            made = {}
        found: dict[str, Any] = made.get(str(round_), {"how": ""})
        return found

    def answered(hospital: Any, asked: Any) -> Any:
        reply, now = answer(hospital, asked), plan(asked.kind, asked.round)
        if now["how"] == "other name":
            return replace(reply, site=now["name"])
        return REPLIES.get(now["how"], _same)(asked, reply)

    def packed(message: Any) -> Any:
        envelope = pack(message)
        kind = "round" if getattr(message, "delta", None) else "other"
        change = TEXTS.get(plan(kind, message.round)["how"])
        if change is None:
            return envelope
        return replace(envelope, about=json.dumps(change(json.loads(envelope.about))))

    def sealed(self: Any, about: str, asked: Any, envelope: Any) -> Any:
        from medfl.common.receipts import attach, detach
        from medfl.common.receipts import seal as sign

        made, now = seal(self, about, asked, envelope), plan(asked.kind, asked.round)
        last.append(made)
        if now["how"] == "replay":
            return last[-2]
        if now["how"] in ("other seal", "unsealed"):
            bare, mine = detach(made)
            if now["how"] == "unsealed" or mine is None:
                return bare
            forged = replace(mine, site=now["name"], signature="")
            return attach(bare, sign(self.home.signing_key(), forged))
        return made

    def recorded(envelope: Any) -> Any:
        record, plain = to_record(envelope), json.loads(envelope.about)
        kind = "round" if envelope.arrays.get("delta") else "other"
        now = plan(kind, plain.get("round", 0))
        if now["how"] in ("pickle", "object"):
            _with_objects(record, now["how"], now["canary"])
        return record

    flower.answer, flower.pack, flower.to_record = answered, packed, recorded
    Approved.seal = sealed


def _same(asked: Any, reply: Any) -> Any:
    return reply


def _delta(change: Change) -> Callable[[Any, Any], Any]:
    """A change of the parameters themselves, packed or not."""

    def spoilt(asked: Any, reply: Any) -> Any:
        from medfl.common.packing import is_packed, unpack

        shapes = {n: a.shape for n, a in asked.weights.items()}
        delta = unpack(reply.delta, shapes) if is_packed(reply.delta) else dict(reply.delta)
        return replace(reply, delta=change(delta))

    return spoilt


def _first(value: float) -> Change:
    def change(delta: dict[str, Any]) -> dict[str, Any]:
        name = sorted(delta)[0]
        array = delta[name].copy()
        array.flat[0] = value
        return {**delta, name: array}

    return change


def _scaled(factor: float) -> Change:
    return lambda delta: {n: (factor * a).astype(np.float32) for n, a in delta.items()}


def _matrix(change: Callable[[Any], Any]) -> Change:
    return lambda delta: {n: change(a) if a.ndim == 2 else a for n, a in delta.items()}


def _cases(n: int) -> Callable[[Any, Any], Any]:
    return lambda asked, reply: replace(reply, n_cases=n)


def _bomb(asked: Any, reply: Any) -> Any:
    import zstandard

    from medfl.common.packing import pack

    zeros = {n: np.zeros_like(a) for n, a in asked.weights.items()}
    content = zstandard.ZstdCompressor(level=3).compress(bytes(2**30))
    return replace(reply, delta={**pack(zeros, "float32"), "0": np.frombuffer(content, np.uint8)})


def _gossip(asked: Any, reply: Any) -> Any:
    metrics = {"validation": {**reply.metrics.get("validation", {}), "age of Mrs Canary": 71.0}}
    return replace(reply, metrics=metrics, left_out={"Mrs Canary": 1})


REPLIES: dict[str, Callable[[Any, Any], Any]] = {
    "nan": _delta(_first(float("nan"))),
    "inf": _delta(_first(float("-inf"))),
    "shape": _delta(_matrix(lambda a: a.T.copy())),
    "broadcast": _delta(_matrix(lambda a: a.ravel()[:1].copy())),
    "missing": _delta(lambda d: {n: a for n, a in d.items() if a.ndim == 2}),
    "extra": _delta(lambda d: {**d, "more": np.zeros(1, np.float32)}),
    "float64": _delta(_matrix(lambda a: a.astype(np.float64))),
    "int": _delta(_matrix(lambda a: a.astype(np.int32))),
    "1e15": _cases(10**15),
    "negative": _cases(-5),
    "none": _cases(0),
    "x1000": _delta(_scaled(1000.0)),
    "flip": _delta(_scaled(-10.0)),
    "zero": _delta(_scaled(0.0)),
    "bomb": _bomb,
    "gossip": _gossip,
}
TEXTS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "nan cases": lambda plain: {**plain, "n_cases": float("nan")},
    "text": lambda plain: {**plain, "note": "Mrs Canary, born 1950-01-01"},
}


class _Canary:
    """Unpickling it makes a file."""

    def __init__(self, file: str) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return (open, (self.file, "w"))


def _with_objects(record: Any, how: str, canary: str) -> None:
    """The parameters as a pickle, or as a NumPy array of objects."""
    import io
    import pickle

    from flwr.app import Array, ArrayRecord, ConfigRecord

    if how == "pickle":
        raw, form = pickle.dumps(_Canary(canary)), "pickle"
    else:
        buffer = io.BytesIO()
        np.save(buffer, np.array([_Canary(canary)], dtype=object), allow_pickle=True)
        raw, form = buffer.getvalue(), "numpy.ndarray"
    about = record.config_records["about"]
    record["about"] = ConfigRecord({k: v for k, v in about.items() if k != "delta"})
    record["delta"] = ArrayRecord({"safetensors": Array("object", (1,), form, raw)})
