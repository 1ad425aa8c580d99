"""The base of every schema class, the short spellings of counts and durations, and "did you mean"."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable
from decimal import Decimal
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


class Schema(BaseModel):
    """A frozen piece of a spec. Types are not coerced, unknown keys and non-finite numbers are refused."""

    # Validators are built when they are first used: importing specs takes half as long.
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False, defer_build=True)

    def written(self) -> dict[str, Any]:
        """Plain data that makes the same piece again: what is at its default is left out, a `kind` never."""
        found = {}
        for name, info in type(self).model_fields.items():
            value = getattr(self, name)
            if name == "kind" or value != info.get_default(call_default_factory=True):
                found[name] = _written(value)
        return found

    def plain(self, *, leave: Collection[str] = ()) -> dict[str, Any]:
        """Every field but `leave` as plain data: what `model_dump` gives, which builds a serializer for each class first."""
        return {name: _plain(getattr(self, name)) for name in type(self).model_fields if name not in leave}


def _plain(value: Any) -> Any:
    if isinstance(value, Schema):
        return value.plain()
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    return type(value)(map(_plain, value)) if isinstance(value, (list, tuple)) else value


def _written(value: Any) -> Any:
    if isinstance(value, Schema):
        return value.written()
    if isinstance(value, dict):
        return {key: _written(one) for key, one in value.items()}
    return [_written(one) for one in value] if isinstance(value, (list, tuple)) else value


NAME_PATTERN = r"^[A-Za-z_][A-Za-z0-9_-]{0,63}$"
NAME_HINT = "letters, digits, '_' and '-', at most 64; a letter or '_' first"
# ASCII alone: two names that look the same are the same.
Name = Annotated[str, Field(pattern=NAME_PATTERN)]

_COUNT = re.compile(r"([0-9][0-9_]{0,18}(?:\.[0-9]{1,9})?)\s?([kKMGBT]?)")
_FACTORS = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "G": 10**9, "B": 10**9, "T": 10**12}
_DURATION = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)\s?(s|m|h|d)")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
# Neither may be zero, however it is spelled.
_SOME_DIGIT = r"(?=\s*[0-9_.]*[1-9])"


def nearest(name: object, known: Iterable[str]) -> str | None:
    """The known name that `name` was probably meant to be, if there is one."""
    options = list(known)
    # A long text is no slip of the finger, and comparing it would take long.
    text = str(name)[:64]
    by_lower = {option.lower(): option for option in reversed(options)}
    found = difflib.get_close_matches(text.lower(), list(by_lower), n=1, cutoff=0.65)
    return by_lower[found[0]] if found else None


def count_of(value: Any) -> Any:
    """`400k` as 400000; what is no text is handed on."""
    if not isinstance(value, str):
        return value
    match = _COUNT.fullmatch(value.strip())
    if match is None:
        raise ValueError("expected a whole number such as 4096, 400k, 20M or 1.5B")
    # Decimal, because 1.1 * 1000 is not 1100 in floating point.
    number = Decimal(match[1].replace("_", "")) * _FACTORS[match[2]]
    if number != int(number):
        raise ValueError(f"{value.strip()} is not a whole number")
    return int(number)


def duration_of(value: Any) -> Any:
    """`5m` as 300.0 seconds; what is no text is handed on."""
    if not isinstance(value, str):
        return value
    match = _DURATION.fullmatch(value.strip())
    if match is None:
        raise ValueError("expected seconds, or a duration such as 90s, 5m, 2h or 1d")
    return float(Decimal(match[1]) * _SECONDS[match[2]])


CountText = Annotated[str, Field(pattern=f"^{_SOME_DIGIT}\\s*{_COUNT.pattern}\\s*$")]
Count = Annotated[
    int,
    Field(ge=1, le=10**15),
    BeforeValidator(
        count_of,
        json_schema_input_type=Annotated[
            Annotated[int, Field(ge=1, le=10**15)] | CountText, Field(examples=["400k", "20M"])
        ],
    ),
]
Duration = Annotated[
    float,
    Field(gt=0, le=10**8),
    BeforeValidator(
        duration_of,
        json_schema_input_type=Annotated[
            Annotated[float, Field(gt=0, le=10**8)]
            | Annotated[str, Field(pattern=f"^{_SOME_DIGIT}\\s*{_DURATION.pattern}\\s*$")],
            Field(examples=["90s", "5m"]),
        ],
    ),
]
