"""Patients who have withdrawn consent: left out before anything of theirs is read.

The list holds keyed hashes of the hospital's own numbers, one a line: it says nobody's name, and
only the site's key can tell whether somebody is on it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from medfl.client.data.cases import CaseRef
from medfl.client.deid.keys import secret_path, withdrawn_hash
from medfl.common.errors import ConfigError, StorageError
from medfl.common.site import Site
from medfl.common.tensors import write_atomic


def list_path(site: Site) -> Path:
    """Beside the site's key."""
    return secret_path(site).with_name(".medfl-withdrawn")


def load_withdrawn(path: Path) -> frozenset[str]:
    """The hashes on the list; none where there is no list.

    Raises:
        ConfigError: the list is damaged: then nobody can say who is on it.
        StorageError: it cannot be read.
    """
    try:
        hashes = path.read_text(encoding="ascii").split()
    except FileNotFoundError:
        return frozenset()
    except (OSError, UnicodeDecodeError) as error:
        raise StorageError(
            f"{path}: the list of withdrawn patients cannot be read ({error})"
        ) from None
    if any(len(h) != 64 or set(h) - set("0123456789abcdef") for h in hashes):
        raise ConfigError(f"{path}: the list of withdrawn patients is damaged; restore the backup")
    return frozenset(hashes)


def change_list(path: Path, secret: bytes, patient: str, *, withdrawn: bool) -> bool:
    """Put a patient on the list or take one off; True where that changed it."""
    if not patient.strip():
        raise ConfigError("The patient's number is empty; write it as the hospital does")
    before = load_withdrawn(path)
    own = frozenset({withdrawn_hash(secret, patient)})
    after = before | own if withdrawn else before - own
    if after == before:
        return False
    write_atomic(path, "".join(f"{h}\n" for h in sorted(after)).encode("ascii"))
    os.chmod(path, 0o600)
    return True


def withdrawn_among(site: Site, secret: bytes) -> Callable[[CaseRef], bool]:
    """Says of a case whether its patient, by header or by table, is on the site's list."""
    hashes = load_withdrawn(list_path(site))

    def has_withdrawn(ref: CaseRef) -> bool:
        names = {ref.patient, ref.fields.get("patient", ""), ref.fields.get("header_patient", "")}
        return any(withdrawn_hash(secret, name) in hashes for name in names if name)

    return has_withdrawn
