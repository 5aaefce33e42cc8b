"""Packed updates: by hand, over many rounds, and what a hostile one can do to the receiver."""

from __future__ import annotations

import json
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from medfl.common import packing
from medfl.common.errors import FederationError
from medfl.common.packing import (
    KINDS,
    Kind,
    is_packed,
    pack,
    pack_exactly,
    pack_with_feedback,
    read_head,
    unpack,
)
from medfl.common.tensors import Array, Tensors

MODEL = {"w": (40, 30), "b": (30,), "scalar": (), "none": (0, 3)}


def shapes_of(tensors: Tensors) -> dict[str, tuple[int, ...]]:
    return {name: a.shape for name, a in tensors.items()}


def there_and_back(tensors: Tensors, kind: Kind) -> dict[str, Array]:
    return unpack(pack(tensors, kind), shapes_of(tensors))


def one(*values: float) -> dict[str, Array]:
    return {"w": np.array(values, dtype=np.float32)}


def update(seed: int = 0) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    return {n: np.asarray(rng.normal(size=s), dtype=np.float32) for n, s in MODEL.items()}


def n_bytes(packed: Tensors) -> int:
    return sum(a.nbytes for a in packed.values())


def test_int8_by_hand() -> None:
    # Step 1.27 / 127 = 0.01: 0.014 is nearest to 1 step, -0.5 is -50 steps, 0.004 is none.
    got = there_and_back(one(1.27, 0.014, -0.5, 0.004, 0.0), "int8")["w"]
    np.testing.assert_allclose(got, [1.27, 0.01, -0.5, 0.0, 0.0], rtol=1e-6)


def test_int4_by_hand() -> None:
    # Step 0.7 / 7 = 0.1: 0.14 is nearest to 1 step, -0.7 is -7 steps, 0.04 is none; 5 is odd.
    got = there_and_back(one(0.7, 0.14, -0.7, 0.04, -0.26), "int4")["w"]
    np.testing.assert_allclose(got, [0.7, 0.1, -0.7, 0.0, -0.3], rtol=1e-6, atol=1e-7)


def test_int4_puts_two_numbers_in_a_byte() -> None:
    # Steps 7, -7, 1 of the step 1 are 15, 1, 9 as half bytes, and 8 (a zero) fills the last byte.
    packed = pack(one(7.0, -7.0, 1.0), "int4")
    raw = zstandard.ZstdDecompressor().decompress(packed["0"].tobytes())
    assert raw == np.float32(1.0).tobytes() + bytes([0x1F, 0x89])


def test_every_block_of_256_has_a_step_of_its_own() -> None:
    values = np.concatenate([np.full(256, 127.0), np.full(256, 0.0127), [-12.7]])
    got = there_and_back({"w": values}, "int8")["w"]
    np.testing.assert_allclose(got, values, rtol=1e-6)
    # One step for all of them would be 1, and the second block would vanish.
    assert got[300] > 0


def test_float16_by_hand() -> None:
    # 1e-8 alone is below half precision's smallest number, 7e4 above its largest.
    for values in ([1e-8, 2.5e-9], [7e4, -8e3], [3e38, -1e37]):
        got = there_and_back(one(*values), "float16")["w"]
        np.testing.assert_allclose(got, values, rtol=1e-3)
    # 11 bits: 2049 lies between 2048 and 2050.
    assert there_and_back(one(2049.0), "float16")["w"].tolist() == [2048.0]


def test_float32_keeps_every_bit_also_of_what_is_no_number() -> None:
    odd = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45, 3.4e38], dtype=np.float32)
    got = there_and_back({"w": odd}, "float32")["w"]
    assert got.tobytes() == odd.tobytes()


@given(arrays(np.float32, array_shapes(max_dims=3, max_side=9, min_side=0)))
def test_float32_is_lossless(values: Array) -> None:
    got = there_and_back({"w": values}, "float32")["w"]
    assert (got.shape, got.dtype, got.tobytes()) == (values.shape, np.float32, values.tobytes())


KINDS_OF_STEPS: dict[Kind, int] = {"int8": 127, "int4": 7}
finite = st.floats(-1e6, 1e6, width=32)


@given(arrays(np.float32, st.integers(1, 600), elements=finite))
def test_rounding_stays_within_half_a_step(values: Array) -> None:
    for kind, steps in KINDS_OF_STEPS.items():
        got = there_and_back({"w": values}, kind)["w"]
        for start in range(0, len(values), 256):
            block = slice(start, start + 256)
            half_step = np.abs(values[block]).max() / (2 * steps)
            assert np.abs(got[block] - values[block]).max() <= half_step * (1 + 1e-5) + 1e-44
    half = there_and_back({"w": values}, "float16")["w"]
    allowed = np.maximum(np.abs(values) * 2.0**-11, np.abs(values).max() * 2.0**-38)
    assert (np.abs(half - values) <= allowed + 1e-40).all()


@pytest.mark.parametrize("kind", KINDS)
def test_names_shapes_and_the_argument_survive(kind: Kind) -> None:
    tensors = update()
    before = {n: a.copy() for n, a in tensors.items()}
    got = there_and_back(tensors, kind)
    assert shapes_of(got) == MODEL
    assert {a.dtype for a in got.values()} == {np.dtype(np.float32)}
    assert all((tensors[n] == before[n]).all() for n in before)
    assert list(got) == list(tensors)
    packed = pack(tensors, kind)
    assert {(a.dtype, a.ndim) for a in packed.values()} == {(np.dtype(np.uint8), 1)}


@pytest.mark.parametrize("kind", KINDS)
def test_segments_change_only_how_many_parts_there_are(
    kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = {"a": np.arange(5000, dtype=np.float32), **update()}
    whole = there_and_back(tensors, kind)
    monkeypatch.setattr(packing, "_SEGMENT", 512)
    packed = pack(tensors, kind)
    assert len(packed) > 10
    cut = unpack(packed, shapes_of(tensors))
    # float16's scale is one a piece, so the last bit may differ there.
    np.testing.assert_allclose(cut["a"], whole["a"], rtol=1e-3 if kind == "float16" else 0)


def test_the_order_of_names_is_the_senders_affair() -> None:
    tensors = {"a": np.float32([1, 2]), "b": np.float32([3, 4])}
    got = unpack(pack(tensors, "float32"), {"b": (2,), "a": (2,)})
    assert (got["a"].tolist(), got["b"].tolist()) == ([1, 2], [3, 4])


def test_packing_exactly_never_makes_more_bytes() -> None:
    few = one(1.0, 2.0)
    assert pack_exactly(few) is few
    assert not is_packed(few)
    many = {"w": np.zeros(5000, dtype=np.float32)}
    packed = pack_exactly(many)
    assert n_bytes(packed) < 500
    assert is_packed(packed)
    assert (unpack(packed, {"w": (5000,)})["w"] == 0).all()


def test_nothing_is_a_packed_group_too() -> None:
    assert unpack(pack({}, "int8"), {}) == {}


def test_bytes_are_an_eighth_with_int4_a_quarter_with_int8_and_half_with_float16() -> None:
    tensors = {"w": np.random.default_rng(0).normal(size=200_000).astype(np.float32)}
    whole = tensors["w"].nbytes
    sizes = {kind: n_bytes(pack(tensors, kind)) / whole for kind in KINDS}
    assert sizes["float32"] < 0.95
    assert sizes["float16"] < 0.48
    assert sizes["int8"] < 0.25
    assert sizes["int4"] < 0.125


@pytest.mark.parametrize(("kind", "steps"), KINDS_OF_STEPS.items())
def test_a_constant_update_arrives_whole_over_the_rounds_only_with_feedback(
    kind: Kind, steps: int
) -> None:
    # Beside one value of 1, 0.38 steps round to nothing and 0.65 to a whole step.
    gradient = one(1.0, 0.38 / steps, -0.38 / steps, 0.65 / steps)
    residual: Tensors = {}
    with_feedback, without = np.zeros(4), np.zeros(4)
    for _ in range(50):
        packed, residual = pack_with_feedback(gradient, residual, kind)
        with_feedback += unpack(packed, {"w": (4,)})["w"] / 50
        without += there_and_back(gradient, kind)["w"] / 50
    # All that is missing is the last residual, half a step at most, over 50 rounds.
    np.testing.assert_allclose(with_feedback, gradient["w"], atol=0.5 / steps / 50 * 1.15)
    assert without[1] == without[2] == 0.0
    assert abs(without[3] - gradient["w"][3]) > 0.3 / steps


def test_the_residual_is_exactly_what_was_not_sent() -> None:
    first, second = update(1), update(2)
    packed, residual = pack_with_feedback(first, {}, "int8")
    again, last = pack_with_feedback(second, residual, "int8")
    for name, shape in MODEL.items():
        sent = unpack(packed, MODEL)[name] + unpack(again, MODEL)[name]
        np.testing.assert_allclose(sent + last[name], first[name] + second[name], atol=1e-5)
        assert last[name].shape == shape


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_still_seen_after_unpacking(kind: Kind, odd: float) -> None:
    got = there_and_back(one(1.0, odd, -2.0), kind)["w"]
    assert not np.isfinite(got).all()


def rewritten(packed: Tensors, **changes: object) -> dict[str, Array]:
    about = {**json.loads(packed["head"].tobytes()), **changes}
    return {**packed, "head": np.frombuffer(json.dumps(about).encode(), np.uint8)}


GOOD = pack(update(), "int8")
BAD: dict[str, tuple[Tensors, str]] = {
    "no head": ({"0": GOOD["0"]}, "is not packed"),
    "not bytes": ({**GOOD, "0": GOOD["0"].astype(np.float32)}, "is not packed"),
    "plain floats": (update(), "is not packed"),
    "no JSON": ({**GOOD, "head": np.zeros(9, np.uint8)}, "cannot be read"),
    "deep JSON": ({**GOOD, "head": np.full(4000, ord("["), np.uint8)}, "cannot be read"),
    "long head": ({**GOOD, "head": np.full(10**6, ord(" "), np.uint8)}, "too long"),
    "version": (rewritten(GOOD, version=2), "does not know"),
    "kind": (rewritten(GOOD, kind="int2"), "does not know"),
    "twice": (
        rewritten(GOOD, tensors=[*([n, list(s)] for n, s in MODEL.items()), ["w", [40, 30]]]),
        "does not know",
    ),
    "negative": (rewritten(GOOD, tensors=[["w", [-1]]]), "cannot be read"),
    "fraction": (rewritten(GOOD, tensors=[["w", [1.0]]]), "cannot be read"),
    "other shape": (rewritten(GOOD, tensors=[["w", [10**12]]]), "other parameters"),
    "other kind": (rewritten(GOOD, kind="float32"), "another size"),
    "half the size": (rewritten(GOOD, kind="int4"), "another size"),
    "part missing": ({"head": GOOD["head"]}, "parts"),
    "part too many": ({**GOOD, "1": GOOD["0"]}, "parts"),
    "cut": ({**GOOD, "0": GOOD["0"][:-5]}, "damaged"),
    "empty": ({**GOOD, "0": GOOD["0"][:0]}, "damaged"),
    "more behind": ({**GOOD, "0": np.concatenate([GOOD["0"], GOOD["0"]])}, "damaged"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_group_is_refused_in_words(name: str) -> None:
    packed, why = BAD[name]
    with pytest.raises(FederationError, match=why):
        unpack(packed, MODEL)


@pytest.mark.parametrize("kind", KINDS_OF_STEPS)
def test_any_changed_byte_is_refused_or_unpacks_to_the_models_shapes(kind: Kind) -> None:
    good = pack(update(), kind)
    body = good["0"]
    for position in range(0, len(body), 7):
        changed = body.copy()
        changed[position] ^= 0x55
        try:
            got = unpack({**good, "0": changed}, MODEL)
        except FederationError:
            continue
        assert shapes_of(got) == MODEL


def bomb(size: int) -> dict[str, Array]:
    """A sound head, and a part of a few bytes that would unpack to `size`."""
    compressor = zstandard.ZstdCompressor(level=19)
    content = compressor.compress(bytes(size))
    return {**GOOD, "0": np.frombuffer(content, np.uint8)}


def test_a_bomb_is_refused_before_memory_is_set_aside() -> None:
    packed = bomb(2**28)
    assert n_bytes(packed) < 2**15
    tracemalloc.start()
    with pytest.raises(FederationError, match="another size"):
        unpack(packed, MODEL)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20


LIED = """
import resource, numpy as np, zstandard
from medfl.common.errors import FederationError
from medfl.common.packing import pack, unpack
good = pack({"w": np.zeros(1000, np.float32)}, "float32")
# RFC 8878, 3.1.1.1: a single segment of 2^33 bytes, and one empty last block.
size = (2**33).to_bytes(8, "little")
lied = zstandard.FRAME_HEADER + bytes([0xC0 | 0x20]) + size + bytes([1, 0, 0])
good["0"] = np.frombuffer(lied, np.uint8)
held = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (held + 2**26, held + 2**26))
try:
    unpack(good, {"w": (1000,)})
except FederationError as error:
    print(error)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_frame_that_lies_about_its_size_is_refused_within_64_mib() -> None:
    done = subprocess.run([sys.executable, "-c", LIED], capture_output=True, text=True, check=False)
    assert "another size" in done.stdout, done.stderr


def test_a_frame_that_hides_its_size_is_refused() -> None:
    hidden = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(1000))
    with pytest.raises(FederationError, match="another size"):
        unpack({**GOOD, "0": np.frombuffer(hidden, np.uint8)}, MODEL)


def test_the_head_alone_says_what_there_is() -> None:
    head = read_head(GOOD, MODEL)
    assert (head.kind, dict(head.shapes)) == ("int8", MODEL)
