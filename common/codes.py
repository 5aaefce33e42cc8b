"""Texts of a hospital's files: when one is a number, and when two are the same code."""

from __future__ import annotations

import math
import re
import unicodedata

from medfl.common.errors import CaseError

# What people and programs write as a number; Python's float also takes "1_2", "inf" and other
# scripts' digits.
_NUMBER = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")
# Spreadsheets and data frames write the code 1 as 1.0 as soon as its column has an empty cell.
_WHOLE = re.compile(r"(-?(?:0|[1-9][0-9]{0,14}))\.0+")
_ZEROS = re.compile(r"(?<![0-9])0+(?=[0-9])")


def number(text: str) -> float:
    """A finite number from a table's text. Raises CaseError("not_a_number")."""
    text = text.strip()
    if not _NUMBER.fullmatch(text) or not math.isfinite(float(text)):
        raise CaseError("not_a_number", "a finite number is expected")
    return float(text)


def level(text: str) -> str:
    """A code as it is compared: as written, without outer blanks, and "3.0" as "3".

    A code is a text whatever it looks like: "007", "1E50" and numbers of eighteen digits stay.
    """
    text = text.strip()
    whole = _WHOLE.fullmatch(text)
    return whole[1] if whole else text


def folded(text: str) -> str:
    """The same for texts that differ only by leading zeros, case, blanks or Unicode form.

    For telling people that two names look alike; never for joining what carries them.
    """
    if any("\udc80" <= c <= "\udcff" for c in text):  # a file's name in Windows' old bytes
        text = text.encode("utf-8", "surrogateescape").decode("cp1252", "replace")
    plain = "".join(unicodedata.normalize("NFKC", level(text)).split()).casefold()
    plain = plain.replace("\u200b", "").replace("\ufeff", "")
    return _ZEROS.sub("", plain)


def difference(there: str, here: str, place: str) -> str:
    """Two names that look alike, in words for a person. place: where the second one is."""
    # Bytes of a file's name that are no UTF-8 cannot be printed.
    plain = here.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    same = unicodedata.normalize("NFC", there) == unicodedata.normalize("NFC", here)
    form = ", its accents as other Unicode characters" if same else ""
    return f"the table has {there!r}, the {place} {plain!r}{form}"
