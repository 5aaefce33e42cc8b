"""Named arrays: norms by hand, files that are whole or not there, and no pickle."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from medfl.common import tensors
from medfl.common.errors import StorageError


def some() -> dict[str, tensors.Array]:
    return {
        "weight": np.array([[3.0, -4.0], [0.0, 12.0]], dtype=np.float32),
        "half": np.array([-0.5, 2.0], dtype=np.float16),
        "steps": np.array(7, dtype=np.int64),
        "empty": np.zeros((0, 3), dtype=np.float64),
    }


def equal(left: tensors.Tensors, right: tensors.Tensors) -> bool:
    return left.keys() == right.keys() and all(
        a.dtype == right[n].dtype and a.shape == right[n].shape and np.array_equal(a, right[n])
        for n, a in left.items()
    )


def test_the_norm_is_euclidean_over_all_arrays_with_either_sign() -> None:
    assert tensors.l2_norm({"a": np.array([3.0, -4.0]), "b": np.array([[-12.0]])}) == 13.0


def test_integers_have_no_part_in_the_norm() -> None:
    assert tensors.l2_norm({"a": np.array([-3.0]), "steps": np.array([1000])}) == 3.0
    assert tensors.l2_norm({}) == 0.0


def test_the_norm_of_many_small_floats_loses_nothing() -> None:
    many = np.full(10_000_000, 1e-4, dtype=np.float32)
    exact = float(np.float32(1e-4)) * 10_000_000**0.5
    assert tensors.l2_norm({"a": many}) == pytest.approx(exact, rel=1e-12)


def test_the_norm_does_not_overflow_half_precision() -> None:
    assert tensors.l2_norm({"a": np.full(4, 60_000, dtype=np.float16)}) == 120_000.0


def test_adding_the_difference_gives_the_left_side_back() -> None:
    left = {"w": np.array([1.5, -2.0]), "steps": np.array(3)}
    right = {"w": np.array([0.5, 4.0]), "steps": np.array(1)}
    delta = tensors.subtract(left, right)
    assert delta.keys() == {"w"}
    assert delta["w"].tolist() == [1.0, -6.0]
    back = tensors.add(right, delta)
    assert back["w"].tolist() == [1.5, -2.0]
    assert back["steps"] == 1


def test_arithmetic_leaves_its_arguments_alone() -> None:
    left, right = {"w": np.array([1.0])}, {"w": np.array([2.0])}
    tensors.add(left, right)
    tensors.subtract(left, right)
    assert (left["w"][0], right["w"][0]) == (1.0, 2.0)


def test_a_file_gives_back_names_types_shapes_and_bits(tmp_path: Path) -> None:
    tensors.save(some(), tmp_path / "deep" / "w.safetensors", {"study": "hearts"})
    assert equal(tensors.load(tmp_path / "deep" / "w.safetensors"), some())


def test_a_transposed_array_is_written_as_it_is_seen(tmp_path: Path) -> None:
    seen = np.arange(6, dtype=np.float32).reshape(2, 3).T
    tensors.save({"w": seen}, tmp_path / "w.safetensors")
    assert equal(tensors.load(tmp_path / "w.safetensors"), {"w": seen})
    assert tensors.digest({"w": seen}) == tensors.digest({"w": seen.copy()})


def test_the_digest_sees_names_types_shapes_and_every_value_but_no_order() -> None:
    base = some()
    assert tensors.digest(dict(reversed(list(base.items())))) == tensors.digest(base)
    others = [
        base | {"steps": np.array(8, dtype=np.int64)},
        base | {"steps": np.array([7], dtype=np.int64)},
        base | {"steps": np.array(7, dtype=np.int32)},
        base | {"weight": base["weight"].reshape(4)},
        base | {"weight": np.nextafter(base["weight"], np.float32(99))},
        {("heft" if n == "weight" else n): a for n, a in base.items()},
        {n: a for n, a in base.items() if n != "empty"},
    ]
    digests = {tensors.digest(base), *(tensors.digest(other) for other in others)}
    assert len(digests) == 1 + len(others)


def test_a_pickled_file_is_refused_and_not_run(tmp_path: Path) -> None:
    trap = tmp_path / "trap"

    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (trap,))  # type: ignore[return-value]

    path = tmp_path / "weights.pt"
    path.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(StorageError, match=r"weights\.pt: is not a whole safetensors file"):
        tensors.load(path)
    assert not trap.exists()


@pytest.mark.parametrize("kept", [0, 4, 60, -1])
def test_a_file_that_was_cut_off_is_refused(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "w.safetensors"
    tensors.save(some(), path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(StorageError, match="is not a whole safetensors file"):
        tensors.load(path)


def test_a_missing_file_and_a_folder_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="there is no such file; check the path"):
        tensors.load(tmp_path / "nothing.safetensors")
    with pytest.raises(StorageError, match="could not be read"):
        tensors.load(tmp_path)


def test_a_write_that_stops_halfway_leaves_the_old_file_and_no_litter(tmp_path: Path) -> None:
    path = tmp_path / "state"
    path.write_bytes(b"old")

    def breaks() -> Iterator[bytes]:
        yield b"new, but only half"
        raise OSError(28, "No space left on device")

    with pytest.raises(StorageError, match=r"No space left on device\)\. Free some space"):
        tensors.write_atomic(path, breaks())
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["state"]


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
import json
import numpy as np
from medfl.common import errors, tensors
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    tensors.save({"w": np.ones(100_000)}, Path(sys.argv[1]))
except errors.StorageError as error:
    print(error)
    sys.exit(error.exit_code)
"""


def test_a_disk_that_takes_no_more_leaves_the_old_weights(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    tensors.save(some(), path)
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 7, done.stderr
    assert "could not be written" in done.stdout
    assert equal(tensors.load(path), some())
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]


def test_a_folder_that_cannot_be_made_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match="could not be written"):
        tensors.save(some(), tmp_path / "file" / "w.safetensors")


def test_our_text_is_safetensors_and_its_views_are_the_arrays(tmp_path) -> None:
    from safetensors.numpy import load as by_library
    from safetensors.numpy import save as of_library

    arrays = {
        "a": np.array([[1.5, -2.0]], np.float32),
        "count": np.array(7, np.int64),
        "none": np.zeros((0, 3), np.float32),
        "bytes": np.arange(5, dtype=np.uint8),
        "f": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    }
    by_them = of_library({n: np.asarray(a, order="C") for n, a in arrays.items()})
    text = tensors.header(arrays) + b"".join(
        tensors.raw_bytes(arrays[n]) for n in tensors.file_order(arrays)
    )
    for found in (by_library(text), tensors.views(text), tensors.views(by_them)):
        assert found.keys() == arrays.keys()
        for name, array in arrays.items():
            assert found[name].dtype == array.dtype
            np.testing.assert_array_equal(found[name], array)


@pytest.mark.parametrize(
    "about",
    [
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}},
        {"a": {"dtype": "F32", "shape": [10**30], "data_offsets": [0, 4]}},
        {"a": {"dtype": "O", "shape": [1], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}},
        {"a": {"dtype": "F32", "shape": 1, "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}},
        {},
        [],
        5,
    ],
)
def test_a_text_whose_header_does_not_fit_is_refused(about) -> None:
    head = json.dumps(about).encode()
    with pytest.raises(ValueError):  # noqa: PT011
        tensors.views(len(head).to_bytes(8, "little") + head + bytes(8))
    with pytest.raises(ValueError):  # noqa: PT011
        tensors.views((2**60).to_bytes(8, "little") + head)
