"""What is checked of a hospital's machine: GPU, disk, and who may read and write what."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from medfl.client.premises import Home
from medfl.common.errors import ConfigError, MedflError, PolicyRefused, StorageError
from medfl.common.private_files import private_folder, read_private
from medfl.common.site import Site

_LOW_BYTES, _WARN_BYTES, _WARN_CACHE_BYTES = 100e6, 1e9, 5e9
State = Literal["green", "warning", "red", "note"]


@dataclass(frozen=True, slots=True)
class Item:
    """One line of the page. todo: the remedy. detail: for the hospital's own screen only.

    code: exit code of what is red.
    """

    topic: str
    state: State
    said: str
    todo: str = ""
    detail: str = ""
    code: int = 0

    def to_plain(self) -> dict[str, Any]:
        """Without what must not leave."""
        return {"topic": self.topic, "state": self.state, "said": self.said, "todo": self.todo}


def gpu(site: Site | None) -> Iterator[Item]:
    """Whether there is the GPU that site.toml asks for, and whether it computes."""
    wanted = "auto" if site is None else site.device
    if wanted == "cpu":
        yield Item("gpu", "green", "site.toml says cpu: training needs no GPU")
        return
    import torch

    if not torch.cuda.is_available():
        built = "is built for the CPU only" if torch.version.cuda is None else "sees no GPU"
        if wanted == "auto":
            yield Item("gpu", "green", f"none (torch {built}): training runs on the CPU")
        else:
            yield Item(
                "gpu",
                "red",
                f"site.toml asks for a GPU and torch {built}",
                "Look at nvidia-smi and the driver; deploy/install-torch.sh installs the build of "
                'torch that fits. Or write device = "auto" in site.toml.',
                code=PolicyRefused.exit_code,
            )
        return
    try:
        torch.ones(8, device="cuda").sum().item()
        free, whole = (n / 1e9 for n in torch.cuda.mem_get_info())
    except RuntimeError as error:  # CUDA's errors; they name no file of the hospital
        yield Item(
            "gpu", "red", "the GPU does not compute", "Look at nvidia-smi; restart the machine.",
            str(error).splitlines()[0], 1,
        )  # fmt: skip
        return
    said = f"{torch.cuda.get_device_name()}, {free:.1f} of {whole:.1f} GB free"
    yield Item("gpu", "green" if free > 0.2 * whole else "warning", said)


def disk(home: Home, site: Site | None) -> Item:
    """Room for state, prepared cases and the ledger."""
    places = {"state": (home.folder, _WARN_BYTES)}
    if site is not None:
        places["cache"] = (site.cache.path, _WARN_CACHE_BYTES)
        places["privacy ledger"] = (site.ledger, _WARN_BYTES)
    state: State = "green"
    told, low = [], []
    for name, (place, enough) in places.items():
        free = shutil.disk_usage(existing(place)).free
        told.append(f"{name} {free / 1e9:.1f} GB free")
        if free < enough:
            low.append(name)
            state = "red" if free < _LOW_BYTES or state == "red" else "warning"
    todo = f"Free some space for: {', '.join(low)}." if low else ""
    return Item("disk", state, ", ".join(told), todo, code=StorageError.exit_code)


def permissions(home: Home, site: Site | None) -> Iterator[Item]:
    """Keys that are open to others, folders that cannot be written, data that cannot be read."""
    faults = list(_open_to_others(home))
    places = {"state": home.folder}
    if site is not None:
        places |= {"cache": site.cache.path, "privacy ledger": site.ledger}
    faults += [
        (f"the folder of the {name} cannot be written", str(place))
        for name, place in places.items()
        if not os.access(existing(place), os.W_OK | os.X_OK)
    ]
    for source in () if site is None else site.sources:
        if not os.access(source.path, os.R_OK):
            there = "cannot be read" if source.path.exists() else "are not there"
            faults.append((f"the data {there}", str(source.path)))
    if not faults:
        yield Item("permissions", "green", "keys are this user's alone; folders can be used")
    for said, detail in faults:
        todo = "Give the user that runs medfl-client the right, or name another place in site.toml."
        yield Item("permissions", "red", said, todo, detail, ConfigError.exit_code)


def _open_to_others(home: Home) -> Iterator[tuple[str, str]]:
    if not home.enrolment_file.exists():
        return
    try:
        private_folder(home.folder)
        for file in (home.identity_file, home.signing_file, home.authority_file):
            read_private(file)
    except MedflError as error:
        yield "a key or its folder is missing, damaged or open to other users", str(error)


def existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    while not folder.exists():
        folder = folder.parent
    return folder
