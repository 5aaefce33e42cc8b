"""`@written`: a frozen dataclass that a person fills in a TOML file; unknown keys are refused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, TypeVar, dataclass_transform

from pydantic import (
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)
from pydantic_core import PydanticCustomError

T = TypeVar("T")


@dataclass_transform(frozen_default=True, kw_only_default=True)
def written(cls: type[T]) -> type[T]:
    """Make `cls` a frozen, keyword-only dataclass that pydantic validates strictly by key."""
    made: Any = dataclass(frozen=True, kw_only=True)(cls)
    made.__pydantic_config__ = ConfigDict(extra="forbid")
    return made  # type: ignore[no-any-return]


Name = Annotated[
    str,
    Field(
        pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$",
        description="lower-case letters, digits, - and _",
    ),
]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


def _option(value: Any, check: ValidatorFunctionWrapHandler) -> Any:
    """One fault for the key instead of one for each type that it might have had."""
    try:
        return check(value)
    except ValidationError:
        raise PydanticCustomError("option_type", "Input should be an option's value") from None


Option = Annotated[
    str | bool | int | float | list[int] | list[float] | list[str], WrapValidator(_option)
]
