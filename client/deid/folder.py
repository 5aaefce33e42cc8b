"""`medfl-client deid DIR OUT`: de-identified copies of a folder's images, under new names."""

from __future__ import annotations

import json
import logging
import os
import stat
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from medfl.client.deid import table
from medfl.client.readers import sandbox
from medfl.common.errors import CaseError, ConfigError, DataError, StorageError
from medfl.common.site import Deid
from medfl.common.tensors import write_atomic

log = logging.getLogger(__name__)

SUMMARY = "deid.json"
_FILE_S = 120.0
_AT_ONCE = min(4, os.cpu_count() or 1)


@dataclass(frozen=True, slots=True)
class Summary:
    """What became of a folder, without any name of it.

    skipped: files by reason (see `medfl.client.data.reasons`). copies: files that are a copy of
    another one. look_at: new names of images that seem to hold writing; unseen: images whose
    pictures could not be looked at.
    """

    written: int
    patients: int
    studies: int
    series: int
    copies: int
    skipped: Mapping[str, int]
    look_at: tuple[str, ...]
    unseen: int
    options: Mapping[str, Any]
    profile: tuple[tuple[str, str], ...]

    def to_plain(self) -> dict[str, Any]:
        """As plain JSON types."""
        return asdict(self)


def deidentify_folder(
    source: Path,
    out: Path,
    options: Deid,
    secret: bytes,
    *,
    look: bool = True,
    withdrawn: frozenset[str] = frozenset(),
) -> Summary:
    """Write a de-identified copy of every image below `source` to `out`; `source` is only read.

    The same folder, options and secret give the same files, byte for byte; what is there already
    stays. look: also warn of pictures that seem to hold writing. withdrawn: hashes of the patients
    who are left out.

    Raises:
        ConfigError: one folder lies in the other, or `out` holds something else.
        DataError: no file can be passed on. StorageError: `out` cannot be written.
    """
    _check_places(source, out)
    written: set[Path] = set()
    seen: dict[str, Path] = {}
    counts: Counter[str] = Counter()
    look_at: list[str] = []
    request = {
        "command": "deidentify",
        "options": {k: v for k, v in asdict(options).items() if k != "key"},
        "secret": secret.hex(),
        "look": look,
    }
    for path, answer in _answers(source, request):
        if isinstance(answer, CaseError):
            counts[answer.reason] += 1
            continue
        if answer.plain["withdrawn"] in withdrawn:
            counts["withdrawn"] += 1
            continue
        first = seen.setdefault(answer.plain["instance"], path)
        if first != path:
            counts["uid_conflict" if _differs(path, first) else "copy"] += 1
            continue
        name = _name(answer.plain)
        written.add(name)
        _write(out / name, b"" if answer.array is None else answer.array.tobytes())
        counts["unseen"] += look and answer.plain["text"] is None
        if answer.plain["text"]:
            look_at.append(name.as_posix())
    summary = _summary(written, counts, look_at, options)
    if not written:
        reasons = ", ".join(f"{n} {reason}" for reason, n in summary.skipped.items())
        raise DataError(
            f"No image below the folder can be passed on ({reasons or 'there is no file'}). "
            "`medfl-client check` says what each reason means."
        )
    _write(out / SUMMARY, json.dumps(summary.to_plain(), indent=2, sort_keys=True).encode())
    return summary


def _check_places(source: Path, out: Path) -> None:
    if not source.is_dir():
        raise ConfigError(f"{source}: is not a folder; name the folder that holds the images")
    inside, around = out.resolve(), source.resolve()
    if inside.is_relative_to(around) or around.is_relative_to(inside):
        raise ConfigError(f"{out}: lies in the folder of the originals, or around it; name another")
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out}: is a file; name a folder")
    if out.is_dir() and any(out.iterdir()) and not (out / SUMMARY).is_file():
        raise ConfigError(f"{out}: holds other files; name an empty or a new folder")


def _files(root: Path) -> Iterator[Path]:
    """Every entry below a folder, sorted; links are listed and never followed."""
    for folder, folders, names in os.walk(root, followlinks=False):
        links = [f for f in folders if (Path(folder) / f).is_symlink()]
        folders[:] = sorted(f for f in folders if f not in links)
        yield from (Path(folder) / name for name in sorted([*names, *links]))


def _answers(
    source: Path, request: dict[str, Any]
) -> Iterator[tuple[Path, sandbox.Answer | CaseError]]:
    def one(path: Path) -> sandbox.Answer | CaseError:
        try:
            if not stat.S_ISREG(path.lstat().st_mode):
                return CaseError("not_a_plain_file")
            return sandbox.ask(request | {"file": str(path)}, _FILE_S)
        except CaseError as error:
            return error
        except OSError:
            return CaseError("unreadable")

    paths = list(_files(source))
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for start in range(0, len(paths), 2 * _AT_ONCE):
            batch = paths[start : start + 2 * _AT_ONCE]
            yield from zip(batch, pool.map(one, batch), strict=True)


def _name(plain: dict[str, Any]) -> Path:
    """patient/study/series/instance.dcm, all pseudonyms."""
    parts = [plain[level] or f"no-{level}" for level in ("patient", "study", "series", "instance")]
    return Path(*parts[:-1], f"{parts[-1]}.dcm")


def _differs(one: Path, other: Path) -> bool:
    return one.read_bytes() != other.read_bytes()


def _write(path: Path, content: bytes) -> None:
    """Whole or not at all; what is there and the same stays untouched."""
    try:
        if path.is_file() and not path.is_symlink() and path.read_bytes() == content:
            return
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_atomic(path, content)
        path.chmod(0o600)
    except OSError as error:
        raise StorageError(
            f"{path.name}: cannot be written ({error.strerror}). Check the folder and the free "
            "space; running the same command again goes on where it stopped."
        ) from None


def _summary(
    written: Collection[Path], counts: Counter[str], look_at: list[str], options: Deid
) -> Summary:
    known = ("copy", "unseen")
    return Summary(
        written=len(written),
        patients=len({p.parts[:1] for p in written}),
        studies=len({p.parts[:2] for p in written}),
        series=len({p.parts[:3] for p in written}),
        copies=counts["copy"],
        skipped={r: n for r, n in sorted(counts.items()) if r not in known and n},
        look_at=tuple(sorted(look_at)),
        unseen=counts["unseen"],
        options={k: v for k, v in asdict(options).items() if k != "key"},
        profile=tuple(table.method_codes(options)),
    )


def describe(summary: Summary) -> list[str]:
    """The summary as lines for a terminal."""
    from medfl.client.data.reasons import REASONS

    lines = [
        f"{summary.written} images of {summary.patients} patients, {summary.studies} studies and "
        f"{summary.series} series written."
    ]
    if summary.copies:
        lines.append(f"{summary.copies} files are copies of another one and were written once.")
    if summary.skipped:
        lines.append("Not passed on (the originals stay as they are):")
        lines += [f"  {n:>6} {reason}: {REASONS[reason]}" for reason, n in summary.skipped.items()]
    if summary.look_at:
        lines.append(f"Writing seems to be in {len(summary.look_at)} pictures; look at them:")
        lines += [f"  {name}" for name in summary.look_at[:10]]
    if summary.unseen:
        lines.append(f"{summary.unseen} pictures could not be decoded and looked at.")
    lines.append("Applied: " + "; ".join(f"{code} {name}" for code, name in summary.profile))
    return lines
