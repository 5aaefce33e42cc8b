"""Reading the files that people write: every fault at once, each with file, key and remedy."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Protocol, TypeVar, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError

from medfl.common.errors import ConfigError


class Checked(Protocol):
    """A file's root value; `faults` names keys that contradict each other."""

    def faults(self) -> list[str]:
        """One line each: `key: what is wrong; what to write instead`."""


T = TypeVar("T", bound=Checked)
U = TypeVar("U")

_adapters: dict[type, TypeAdapter[Any]] = {}

# What pydantic says, in the words of somebody who edits a text file.
_WORDS = {
    "missing": "is missing; add it",
    "option_type": "must be text, true or false, a number, or a list of numbers or of texts",
    "string_pattern_mismatch": (
        "must start with a letter or digit and hold up to 63 lower-case letters, digits, - and _"
    ),
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "int_parsing": "must be a whole number",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "string_type": 'must be text in quotes, like "this"',
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "list_type": "must be a list, like [1, 2]",
    "tuple_type": "must be a list, like [1, 2]",
    "dict_type": "must be a table of key = value lines",
    "dataclass_type": "must be a table of key = value lines",
}


def load(path: Path, kind: type[T]) -> T:
    """Read a TOML file as the frozen dataclass `kind`.

    Raises:
        ConfigError: with one line per fault, all of them at once.
    """
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file; check the path") from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: is a folder; name the .toml file in it") from None
    except PermissionError:
        raise ConfigError(f"{path}: may not be read by this user; change its permissions") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not UTF-8 text; save it as UTF-8") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: is not valid TOML: {error}") from None
    return parse(raw, kind, str(path))


def parse(raw: Mapping[str, Any], kind: type[T], source: str) -> T:
    """Turn parsed TOML into `kind`; `source` names the file in the messages. Raises ConfigError."""
    try:
        # As JSON, strict means what a file's reader expects: 1 is a number and text is a path, but
        # "5" and true are not 5 and 1.
        value = decoded(json.dumps(raw, default=str).encode(), kind)
    except ValidationError as error:
        raise ConfigError([f"{source}: {_line(fault, kind)}" for fault in error.errors()]) from None
    if faults := value.faults():
        raise ConfigError([f"{source}: {fault}" for fault in faults])
    return value


def decoded(content: bytes, kind: type[U]) -> U:
    """The value that this JSON is of a kind. Raises ValidationError."""
    # Making an adapter takes longer than using it.
    if kind not in _adapters:
        _adapters[kind] = TypeAdapter(kind)
    value: U = _adapters[kind].validate_json(content, strict=True)
    return value


def _line(fault: Any, kind: type) -> str:
    where = [str(part) for part in fault["loc"] if not str(part).startswith("function-")]
    key = ".".join(where)
    got = (
        "" if fault["type"] in ("missing", "unexpected_keyword_argument") else _got(fault["input"])
    )
    if fault["type"] == "unexpected_keyword_argument":
        known = _known_keys(kind, where[:-1])
        near = get_close_matches(where[-1], known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known keys here: {', '.join(known)}"
        return f"{key}: is not a known key; {hint}"
    if fault["type"] == "literal_error":
        return f"{key}: must be one of {fault['ctx']['expected']}{got}"
    if fault["type"] in ("too_long", "too_short"):
        limit = fault["ctx"].get("max_length") or fault["ctx"]["min_length"]
        side = "most" if fault["type"] == "too_long" else "least"
        return f"{key}: must have at {side} {limit} entries"
    words = _WORDS.get(fault["type"]) or fault["msg"].removeprefix("Input should be ").strip()
    if fault["type"] not in _WORDS and fault["msg"].startswith("Input should be "):
        words = f"must be {words}"
    return f"{key}: {words}{got}"


def _got(value: object) -> str:
    return f" (it is {value!r})" if isinstance(value, str | int | float | bool) else ""


def _known_keys(kind: type, path: list[str]) -> list[str]:
    """Names of the keys allowed at `path` below `kind`, following lists and optional tables."""
    current: Any = kind
    for part in path:
        if get_origin(current) is dict:  # `part` is a name that the file's writer chose
            current = get_args(current)[1]
            continue
        current = _dataclass_in(current)
        if current is None:
            return []
        if not part.isdigit():
            current = get_type_hints(current, include_extras=False).get(part)
    found = _dataclass_in(current)
    return [f.name for f in fields(found)] if found else []


def _dataclass_in(annotation: Any) -> Any:
    if isinstance(annotation, type) and is_dataclass(annotation):
        return annotation
    for inner in get_args(annotation):
        if (found := _dataclass_in(inner)) is not None:
            return found
    return None
