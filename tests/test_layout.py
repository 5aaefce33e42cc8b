"""The house stands as drawn: rooms, walls, and what leaves in the wheel."""

from __future__ import annotations

import ast
import importlib
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import medfl

ROOT = Path(__file__).resolve().parent.parent
MAY_IMPORT: dict[str, set[str]] = {
    "common": set(),
    "strategies": {"common"},
    "client": {"common", "strategies"},
    "server": {"common", "strategies"},
    "simulations": {"common", "strategies", "client", "server"},
}
# One adapter a side, the processes that it starts, and the records that both send: a change in
# Flower is met in few places.
SPEAK_TO_FLOWER = {
    "common/flower_objects.py",
    "common/flower_records.py",
    "client/flower.py",
    "client/heartbeat.py",
    "client/objects.py",
    "client/supernode.py",
    "client/tasks.py",
    "server/flower.py",
    "server/link.py",
    "server/nodes.py",
    "server/objects.py",
    "server/superlink.py",
    "simulations/benchmarks/calls.py",
    "simulations/benchmarks/light.py",
    "simulations/flower.py",
    "simulations/grid.py",
}
# Parts of pydantic, jinja2, typer and flwr (its clients and servers), pinned with them.
COME_WITH_ANOTHER = {
    *("pydantic_core", "markupsafe", "click", "httpx", "uvicorn", "google", "sqlalchemy")
}
HEAVY = {"torch", "monai", "opacus", "flwr", "sklearn", "scipy", "matplotlib", "pydicom"}
# What else no help may wait for.
HEAVY_TO_ASK = {
    *("numpy", "pandas", "ray", "jinja2", "pydantic", "cryptography", "grpc", "sqlalchemy"),
    *("nibabel", "PIL", "h5py", "tensorboardX"),
}


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def sources(room: str) -> list[Path]:
    return sorted(p for p in (ROOT / room).rglob("*.py") if "__pycache__" not in p.parts)


def tracked() -> list[Path]:
    """Files that git knows or would add; skips outside a checkout."""
    done = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        pytest.skip("this is not a git checkout")
    names = (ROOT / name for name in done.stdout.split("\0") if name)
    return [p for p in names if p.is_file() and not p.is_symlink()]


def imports(file: Path) -> Iterator[str]:
    """Dotted names of all modules that `file` imports, also inside functions."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: write medfl... in full"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def packages_on_disk() -> dict[str, Path]:
    """Every folder of the five rooms that holds Python or data files, by package name."""
    found = {}
    for room in MAY_IMPORT:
        for folder in [ROOT / room, *(ROOT / room).rglob("*")]:
            if folder.is_dir() and "__pycache__" not in folder.parts:
                name = ".".join(["medfl", *folder.relative_to(ROOT).parts])
                found[name] = folder
    return found


def test_every_folder_is_a_package_that_pyproject_names() -> None:
    named = set(project()["tool"]["setuptools"]["packages"])
    with_python = {name for name, folder in packages_on_disk().items() if [*folder.glob("*.py")]}
    assert named == with_python | {"medfl"}


def test_every_package_has_an_init() -> None:
    lacking = [
        name
        for name, folder in packages_on_disk().items()
        if [*folder.glob("*.py")] and not (folder / "__init__.py").is_file()
    ]
    assert lacking == []


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_room_imports_only_from_the_rooms_below_it(room: str) -> None:
    allowed = MAY_IMPORT[room] | {room}
    crossed = [
        f"{file.relative_to(ROOT)}: {name}"
        for file in sources(room)
        for name in imports(file)
        if name.startswith("medfl.") and name.split(".")[1] not in allowed | {"__version__"}
    ]
    assert crossed == []


def test_only_the_adapters_speak_to_flower() -> None:
    speakers = {
        file.relative_to(ROOT).as_posix()
        for room in MAY_IMPORT
        for file in sources(room)
        if any(name.split(".")[0] == "flwr" for name in imports(file))
    }
    assert speakers <= SPEAK_TO_FLOWER


def test_nobody_unpickles() -> None:
    users = [
        f"{file.relative_to(ROOT)}: {name}"
        for room in MAY_IMPORT
        for file in sources(room)
        for name in imports(file)
        if name.split(".")[0] in {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
    ]
    assert users == []


def test_no_child_process_takes_a_library_from_the_folder_it_was_started_in() -> None:
    """Without -P, `python -m` looks for modules in the current folder first."""
    started = 0
    for room in ("client", "common", "server", "deploy"):
        for file in (ROOT / room).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.List) and ast.unparse(node).startswith("[sys.executable"):
                    started += 1
                    assert ast.unparse(node.elts[1]) == "'-P'", f"{file}:{node.lineno}"
    assert started >= 5


def test_every_foreign_import_is_a_declared_dependency() -> None:
    """A package that happens to be installed here is not there at a hospital."""
    declared = {
        line.split("[")[0].split("=")[0].split(">")[0].strip().lower()
        for line in project()["project"]["dependencies"]
    }
    providers = metadata.packages_distributions()
    undeclared = {
        f"{file.relative_to(ROOT)}: {top}"
        for room in MAY_IMPORT
        for file in sources(room)
        for top in {name.split(".")[0] for name in imports(file)}
        if top != "medfl"
        and top not in sys.stdlib_module_names
        and not {d.lower() for d in providers.get(top, [top])} & declared
    }
    assert {u for u in undeclared if u.rpartition(": ")[2] not in COME_WITH_ANOTHER} == set()


def test_the_public_names_are_exactly_those_announced() -> None:
    # Modules are no names of ours: `os`, and the rooms once somebody has imported them.
    named = {n for n, value in vars(medfl).items() if not isinstance(value, ModuleType)}
    public = {n for n in named if not n.startswith("_")}
    assert public - {"annotations"} == set(medfl.__all__) - {"__version__"}
    assert all(hasattr(medfl, name) for name in medfl.__all__)
    assert len(medfl.__all__) <= 10


def test_the_version_is_told_once() -> None:
    assert medfl.__version__ == project()["project"]["version"]


ASK_ALL = """
import importlib, sys
import typer
commands = importlib.import_module(sys.argv[1])

def ask(command, path):
    assert getattr(commands, sys.argv[2])([*path, "--help"]) == 0, path
    for name, inner in getattr(command, "commands", {}).items():
        ask(inner, [*path, name])

ask(typer.main.get_command(commands.app), [])
print("\\nLOADED", *sorted({name.partition(".")[0] for name in sys.modules}))
"""


@pytest.mark.parametrize("command", project()["project"]["scripts"].items(), ids=lambda c: c[0])
def test_the_help_of_every_command_is_quick_because_it_loads_nothing_heavy(
    command: tuple[str, str],
) -> None:
    module, _, function = command[1].partition(":")
    if find_spec(module) is None:
        pytest.skip(f"{module} is not written yet")
    done = subprocess.run(
        [sys.executable, "-c", ASK_ALL, module, function],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"NO_COLOR": "1", "TERM": "dumb"},
    )
    assert done.returncode == 0, done.stderr
    help_text, _, loaded = done.stdout.partition("\nLOADED")
    assert help_text.count("Usage: ") >= 6
    assert (HEAVY | HEAVY_TO_ASK) & set(loaded.split()) == set()


def test_no_file_names_the_place_where_it_was_written() -> None:
    # Put together here, or this file would hold them itself.
    banned = ["/" + "work/", "/" + "opt/wheels", "/" + "opt/pypi"]
    contents = {path.relative_to(ROOT): path.read_bytes() for path in tracked()}
    assert not [(p, w) for p, text in contents.items() for w in banned if w.encode() in text]
    # The public data may lie beside the repository, and then only a relative path leads there.
    data = b"/shared" + b"/data"
    assert not [p for p, text in contents.items() if text.count(data) > text.count(b".." + data)]


def test_torchvision_is_absent() -> None:
    """Its wheels fail on import beside a CPU build of torch; nothing here needs it."""
    assert find_spec("torchvision") is None
    locks = [ROOT / "requirements.lock", ROOT / "requirements-dev.lock"]
    assert not any("torchvision" in lock.read_text(encoding="utf-8") for lock in locks)


def test_the_locks_pin_exactly_and_pull_no_cuda() -> None:
    pins = [
        line.removesuffix(" \\")
        for name in ("requirements.lock", "requirements-torch.lock", "requirements-dev.lock")
        for line in (ROOT / name).read_text(encoding="utf-8").splitlines()
        if not line.startswith(("#", "    --hash=sha256:"))
    ]
    assert all(line.count("==") == 1 and "+" not in line and " " not in line for line in pins)
    assert not [line for line in pins if line.startswith(("nvidia", "cuda", "triton"))]
    assert len({line.split("==")[0] for line in pins}) == len(pins)


def test_every_dependency_is_locked() -> None:
    files = [ROOT / "requirements.lock", ROOT / "requirements-torch.lock"]
    locked = "".join(file.read_text(encoding="utf-8").lower() for file in files)
    names = [
        line.split("[")[0].split("=")[0].split(">")[0].strip().lower()
        for line in project()["project"]["dependencies"]
    ]
    assert [name for name in names if f"\n{name}==" not in locked] == []


@pytest.mark.parametrize("script", [".ci/run", "deploy/install-torch.sh"])
def test_a_script_can_be_run(script: str) -> None:
    assert os.access(ROOT / script, os.X_OK)


def test_every_module_can_be_imported_alone() -> None:
    """Found here and not at a hospital: a typing error in a module that no other test loads."""
    for room in MAY_IMPORT:
        for file in sources(room):
            if file.name != "__main__.py":
                parts = file.relative_to(ROOT).with_suffix("").parts
                importlib.import_module(".".join(["medfl", *parts]).removesuffix(".__init__"))


@pytest.mark.slow
def test_the_wheel_holds_every_module_and_data_file(tmp_path: Path) -> None:
    # From a copy: a build/ that lies about would hand its stale files to the wheel.
    copy = tmp_path / "copy"
    for path in tracked():
        place = copy / path.relative_to(ROOT)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, place)
    done = subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path), str(copy)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (wheel,) = tmp_path.glob("*.whl")
    inside = set(zipfile.ZipFile(wheel).namelist())
    for room in MAY_IMPORT:
        ours = [p for p in tracked() if p.is_relative_to(ROOT / room)]
        expected = {f"medfl/{p.relative_to(ROOT).as_posix()}" for p in ours}
        assert expected - inside == set()
    assert {"medfl/__init__.py", "medfl/py.typed"} <= inside
    assert not [name for name in inside if name.split("/")[0] in MAY_IMPORT]
    assert not [name for name in inside if "test" in name or name.endswith(".pyc")]
