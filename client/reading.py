"""One reading of site.toml and the data: what is shown, signed and done come from the same one.

An approval names the reading that it was signed under, so that a file changed afterwards is noticed
at the next question: by a keyed word for site.toml, by the cohort's digest for the data.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import stat
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from medfl.client.data.withdrawn import list_path
from medfl.common.signing import SigningKey
from medfl.common.site import Site

# What changes nothing that anybody agreed to: where it is computed and where copies lie.
_NO_PROMISE = ("device", "cache", "data_sets")
# The data are looked at again for at most this share of the time: a large archive lies far away.
_SHARE = 0.05


@dataclass(frozen=True, slots=True)
class Reading:
    """What an approval is signed for.

    cohort: digest of the cases. cases: how many are trained on, as others may learn. site_toml:
    the word for the file (`site_word`). blind: the hospital is private, and a word for the cohort
    leaves in place of its digest. evaluates: the hospital trains nothing, and cases is 0.
    """

    cohort: str
    cases: int
    site_toml: str = ""
    blind: bool = False
    evaluates: bool = False


def site_word(key: SigningKey, site: Site) -> str:
    """64 hexadecimal digits for all that site.toml promises; the same file gives the same word.

    It is keyed, because it goes to the coordinator in approvals, and a plain digest of so short a
    file could be guessed. key: the hospital's. site: as the study meets it (`Site.of_study`), so
    that a change of another data set is none of its.
    """
    plain = {name: value for name, value in asdict(site).items() if name not in _NO_PROMISE}
    plain["data"] = asdict(site.source)
    if not site.policy.evaluate_only:  # was added later: words of before stay the same
        plain["policy"].pop("evaluate_only")
    secret = hmac.digest(key.private_bytes_raw(), b"medfl word for site.toml", "sha256")
    text = json.dumps(_plain(plain), sort_keys=True)
    return hmac.digest(secret, text.encode(), "sha256").hex()


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, frozenset | set):
        return sorted(str(v) for v in value)
    return value if isinstance(value, str | int | float | None) else str(value)


def data_state(site: Site, apart: Iterable[Path] = ()) -> str:
    """Digest over name, size and time of every file of the site's data and of the list of
    withdrawn patients. apart: folders of medfl's own that may lie among the data."""
    left_out = {_absolute(p) for p in (*apart, site.cache.path, site.ledger)}
    digest, seen = hashlib.sha256(), set[tuple[int, int]]()
    for path in sorted({_absolute(p) for p in (*_data_paths(site), list_path(site))}):
        for line in _states(path, left_out, seen):
            digest.update(f"{line}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


@dataclass(slots=True)
class Watch:
    """Notices that the data are no longer what they were when it was made."""

    site: Site
    apart: tuple[Path, ...] = ()
    _was: str = ""
    _next: float = 0.0

    def __post_init__(self) -> None:
        self._was = self._looked()

    def has_changed(self, now: bool = False) -> bool:
        """Whether something has changed. now: look, however long the last look took."""
        if not now and time.monotonic() < self._next:
            return False
        return self._looked() != self._was

    def _looked(self) -> str:
        began = time.monotonic()
        found = data_state(self.site, self.apart)
        ended = time.monotonic()
        self._next = ended + (ended - began) / _SHARE
        return found


def _states(path: Path, left_out: set[Path], seen: set[tuple[int, int]]) -> Iterator[str]:
    """One line for a file, or for everything below a folder, in the order of the names.

    seen: folders by device and number; a link back to one of them is not followed.
    """
    try:
        state = path.stat()
        if not stat.S_ISDIR(state.st_mode):
            yield f"{path}\0{state.st_size}\0{state.st_mtime_ns}"
            return
        names = sorted(os.listdir(path))
    except OSError as error:
        yield f"{path}\0{error.errno}"
        return
    if (state.st_dev, state.st_ino) in seen or path in left_out:
        return
    seen.add((state.st_dev, state.st_ino))
    for name in names:
        if not name.startswith(".medfl"):
            yield from _states(path / name, left_out, seen)


def _data_paths(value: Any) -> Iterator[Path]:
    """Every path of site.toml that patients' data are read from."""
    if isinstance(value, Path):
        yield value
    elif is_dataclass(value):
        for each in fields(value):
            if each.name not in ("cache", "ledger", "deid"):
                yield from _data_paths(getattr(value, each.name))
    elif isinstance(value, dict):
        for each_value in value.values():
            yield from _data_paths(each_value)
    elif isinstance(value, list | tuple):
        for each_value in value:
            yield from _data_paths(each_value)


def _absolute(path: Path) -> Path:
    return Path(os.path.abspath(path))
