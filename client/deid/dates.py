"""Dates and times moved by a number of seconds, in DICOM's own notation (PS3.5 section 6.2).

Every function answers "" to what is not a date or time, so that no foreign text passes.
"""

from __future__ import annotations

import re
from datetime import datetime, timedelta

_DATE = re.compile(r"(\d{4})\.?(\d{2})\.?(\d{2})")
_TIME = re.compile(r"(\d{2}):?(?:(\d{2}):?(?:(\d{2})(\.\d{1,6})?)?)?")
_MOMENT = re.compile(r"(\d{4})(\d{2})?(\d{2})?(\d{2})?(\d{2})?(\d{2})?(\.\d{1,6})?([+-]\d{4})?")
_AGE = re.compile(r"(\d{3})([DWMY])")
_A_YEAR = {"D": 365.25, "W": 52.18, "M": 12.0, "Y": 1.0}
_OLDEST = 89


def is_date(text: str) -> bool:
    """A whole date that the calendar has."""
    return _moment(text, "") is not None


def is_time(text: str) -> bool:
    """A time of day, to whatever precision."""
    return _clock(text) is not None


def is_moment(text: str) -> bool:
    """A date with or without a time of day, to whatever precision."""
    return bool(shift_moment(text, 0))


def shift_date(date: str, time: str, shift_s: int) -> str:
    """The date of (date, time) after the shift; without a time, noon is taken."""
    moment = _moment(date, time or "120000")
    return "" if moment is None else _moved(moment, shift_s).strftime("%Y%m%d").zfill(8)


def shift_time(time: str, shift_s: int) -> str:
    """The time of day after the shift, with as many digits as before."""
    clock = _clock(time)
    if clock is None:
        return ""
    hours, minutes, seconds = clock
    moved = _moved(datetime(2000, 1, 1, hours, minutes, min(seconds, 59)), shift_s)
    match = _TIME.fullmatch(time.strip())
    fraction = match[4] or "" if match else ""
    digits = len(time.strip().replace(":", "")) - len(fraction)
    return moved.strftime("%H%M%S")[:digits] + fraction


def shift_moment(text: str, shift_s: int) -> str:
    """A DT value after the shift, as precise as before, without its offset from UTC, a place."""
    match = _MOMENT.fullmatch(text.strip())
    if match is None:
        return ""
    parts = [int(p) for p in match.groups()[:6] if p is not None]
    year, month, day, hour, minute, second = (*parts, *(1, 1, 1, 12, 0, 0)[len(parts) :])
    try:
        moved = _moved(datetime(year, month, day, hour, minute, min(second, 59)), shift_s)
    except ValueError:
        return ""
    digits = 4 + 2 * (len(parts) - 1)
    return moved.strftime("%Y%m%d%H%M%S").zfill(14)[:digits] + (match[7] or "")


def capped_age(text: str) -> str:
    """An age of 90 years or more becomes 090Y, for there are few people of each such age."""
    match = _AGE.fullmatch(text.strip())
    if match is None:
        return ""
    years = int(match[1]) / _A_YEAR[match[2]]
    return f"{_OLDEST + 1:03}Y" if years >= _OLDEST + 1 else text.strip()


def _moved(moment: datetime, shift_s: int) -> datetime:
    try:
        return moment + timedelta(seconds=shift_s)
    except OverflowError:
        return datetime(1, 1, 1)


def _moment(date: str, time: str) -> datetime | None:
    match = _DATE.fullmatch(date.strip())
    clock = _clock(time) or (0, 0, 0)
    if match is None:
        return None
    try:
        year, month, day = (int(p) for p in match.groups())
        return datetime(year, month, day, clock[0], clock[1], min(clock[2], 59))
    except ValueError:
        return None


def _clock(time: str) -> tuple[int, int, int] | None:
    match = _TIME.fullmatch(time.strip())
    if match is None:
        return None
    hours, minutes, seconds = (int(p or 0) for p in match.groups()[:3])
    return (hours, minutes, seconds) if hours < 24 and minutes < 60 and seconds <= 60 else None
