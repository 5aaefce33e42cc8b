"""A child process with limits on memory and time, for parsing files that nobody vouches for.

The child runs `medfl.client.readers.dicom_worker`. Both sides speak in frames: eight bytes of
length, JSON, and raw array bytes behind it; nothing is unpickled on either side.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import select
import struct
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from medfl.common.errors import CaseError

log = logging.getLogger(__name__)

# A thousand CT slices as float32 are 1 GB, twice that while they are stacked.
MEMORY_BYTES = 6 * 1024**3
_HEAD = struct.Struct(">QQ")


@dataclass(frozen=True, slots=True)
class Answer:
    """plain: JSON of the child; array: what came with it, if anything."""

    plain: Any
    array: NDArray[np.generic] | None


_idle: list[tuple[int, subprocess.Popen[bytes]]] = []
_lock = threading.Lock()


def ask(request: dict[str, Any], timeout_s: float) -> Answer:
    """One question to a child, with a new one where the last one died.

    Raises:
        CaseError: the child's own reason, or "dicom_worker" when it died or took too long.
    """
    child = _take()
    deadline = time.monotonic() + timeout_s
    try:
        answer = _exchange(child, request, deadline)
    except (OSError, EOFError, TimeoutError, ValueError) as error:
        _end(child)
        log.warning("a DICOM reading process was ended: %s", type(error).__name__)
        raise CaseError("dicom_worker", f"{type(error).__name__}") from None
    with _lock:
        _idle.append((os.getpid(), child))
    if "reason" in answer.plain:
        raise CaseError(answer.plain["reason"], answer.plain["detail"])
    return answer


def _take() -> subprocess.Popen[bytes]:
    with _lock:
        while _idle:
            pid, child = _idle.pop()
            if pid != os.getpid():
                continue
            if child.poll() is None:
                return child
            _end(child)
    # -P: a folder in the current one must not stand in for a library.
    command = [sys.executable, "-P", "-W", "ignore", "-m", "medfl.client.readers.dicom_worker"]
    return subprocess.Popen(
        [*command, str(MEMORY_BYTES)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        # Unbuffered, so that `select` sees what is there.
        bufsize=0,
    )


def _exchange(child: subprocess.Popen[bytes], request: dict[str, Any], deadline: float) -> Answer:
    if child.stdin is None or child.stdout is None:
        raise OSError("no pipes")
    child.stdin.write(encode(request))
    text, size = _HEAD.unpack(_read(child.stdout, _HEAD.size, deadline))
    plain = json.loads(_read(child.stdout, text, deadline))
    if not size:
        return Answer(plain, None)
    raw = _read(child.stdout, size, deadline)
    array = np.frombuffer(raw, dtype=plain["dtype"]).reshape(plain["shape"])
    return Answer(plain, array)


def _read(pipe: IO[bytes], size: int, deadline: float) -> bytearray:
    if size > MEMORY_BYTES:
        raise ValueError("too large an answer")
    received = bytearray(size)
    view, have = memoryview(received), 0
    while have < size:
        ready, _, _ = select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            raise TimeoutError
        count = os.readv(pipe.fileno(), [view[have:]])
        if count == 0:
            raise EOFError
        have += count
    return received


def encode(plain: dict[str, Any], array: NDArray[np.generic] | None = None) -> bytes:
    """One frame, with the array's bytes behind the JSON."""
    if array is None:
        text = json.dumps(plain).encode()
        return _HEAD.pack(len(text), 0) + text
    described = plain | {"dtype": array.dtype.str, "shape": list(array.shape)}
    text = json.dumps(described).encode()
    return _HEAD.pack(len(text), array.nbytes) + text + array.tobytes()


def read_request(pipe: IO[bytes]) -> Any | None:
    """The child's side: the next request, or None when the parent is gone."""
    head = pipe.read(_HEAD.size)
    if len(head) < _HEAD.size:
        return None
    return json.loads(pipe.read(_HEAD.unpack(head)[0]))


def close() -> None:
    """End the children that wait for work."""
    with _lock:
        for pid, child in _idle:
            if pid == os.getpid():
                _end(child)
        _idle.clear()


def _end(child: subprocess.Popen[bytes]) -> None:
    child.kill()
    child.wait()
    for pipe in (child.stdin, child.stdout):
        if pipe is not None:
            pipe.close()


atexit.register(close)
