"""Options that a study writes for a catalogue's entry, checked against the entry's signature."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any

from medfl.common.errors import ConfigError


def option_defaults(function: Callable[..., Any]) -> dict[str, Any]:
    """The keyword-only arguments of `function` and their defaults: what a study may set."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def checked_options(
    function: Callable[..., Any], options: Mapping[str, Any] | None, where: str
) -> dict[str, Any]:
    """`options` as keyword arguments for `function`; lists become tuples.

    where: the key that the messages start with, such as `model.options`.

    Raises:
        ConfigError: an option that the entry does not have, or one of another type than its
            default; all faults at once.
    """
    defaults, faults, checked = option_defaults(function), [], {}
    for name, value in (options or {}).items():
        if name not in defaults:
            near = get_close_matches(name, defaults, n=1)
            known = ", ".join(defaults) or "none"
            hint = f"did you mean {near[0]}?" if near else f"known options: {known}"
            faults.append(f"{where}.{name}: is not a known option; {hint}")
        elif not _same_kind(value, defaults[name]):
            faults.append(
                f"{where}.{name}: must be {_kind(defaults[name])} (it is {value!r}); "
                f"the default is {defaults[name]!r}"
            )
        else:
            checked[name] = tuple(value) if isinstance(value, list) else value
    if faults:
        raise ConfigError(faults)
    return checked


def _same_kind(value: Any, default: Any) -> bool:
    if isinstance(default, tuple):
        return isinstance(value, list | tuple) and all(
            _same_kind(item, default[0] if default else 0) for item in value
        )
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(default, bool) and isinstance(value, bool)
    if isinstance(default, float):
        return isinstance(value, int | float)
    return isinstance(value, type(default))


def _kind(default: Any) -> str:
    if isinstance(default, tuple):
        return "a list of numbers"
    if isinstance(default, bool):
        return "true or false"
    return {int: "a whole number", float: "a number", str: "text"}[type(default)]
