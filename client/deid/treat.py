"""A de-identified data set, built up from nothing out of what may stay of the original one.

Building up instead of striking out: what no rule below speaks of is not there. Runs in the limited
child process, for it reads what nobody vouches for.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from pydicom._uid_dict import UID_dictionary
from pydicom.datadict import dictionary_has_tag, dictionary_VR, keyword_for_tag, tag_for_keyword
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.tag import BaseTag
from pydicom.valuerep import PersonName

from medfl.client.deid import dates, table, words
from medfl.client.deid.keys import Pseudonyms
from medfl.client.deid.safe_private import SAFE
from medfl.common.site import Deid

# What damaged values make pydicom raise when they are looked at.
BAD_VALUE = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    NotImplementedError,
    OverflowError,
    OSError,
    struct.error,
)
_TEXTS = frozenset({"AE", "LO", "LT", "PN", "SH", "ST", "UC", "UR", "UT"})
_NUMBERS = frozenset(
    {"AT", "DS", "FD", "FL", "IS", "SL", "SS", "SV", "UL", "US", "UV", "OB", "OD", "OF", "OL", "OV"}
) | {"OW"}
_WHEN = frozenset({"DA", "TM", "DT"})
_DUMMIES: dict[str, Any] = {
    "AS": "000Y",
    "CS": "REMOVED",
    "DA": "19000101",
    "DS": "0",
    "DT": "19000101000000",
    "IS": "0",
    "TM": "000000",
}
# Decoding depends on these; the standard defines every value that they may have.
_STRUCTURAL = frozenset(
    {"PhotometricInterpretation", "SpecificCharacterSet", "SegmentationType", "Modality"}
)
# Whoever may be told from their values: these are looked for in everything that stays.
_TELLING = (
    "PatientName PatientID OtherPatientIDs OtherPatientNames PatientBirthName PatientAddress "
    "PatientMotherBirthName AccessionNumber StudyID InstitutionName InstitutionAddress StationName "
    "InstitutionalDepartmentName DeviceSerialNumber ReferringPhysicianName OperatorsName "
    "PerformingPhysicianName NameOfPhysiciansReadingStudy PhysiciansOfRecord RequestingPhysician "
    "ResponsiblePerson AdmissionID IssuerOfPatientID PerformedProcedureStepID RequestedProcedureID"
).split()


@dataclass(frozen=True, slots=True)
class Context:
    """What treatment depends on, the same for all levels of one data set.

    telling: words of names and numbers that identify; a text that stays must hold none of them.
    """

    options: Deid
    pseudonyms: Pseudonyms
    patient: str
    shift_s: int
    telling: frozenset[str]


def context(dataset: Any, options: Deid, pseudonyms: Pseudonyms) -> Context:
    """Whose data set this is: by Patient ID, else by name and birth date, else by study."""
    name, birth = _text(dataset, "PatientName"), _text(dataset, "PatientBirthDate")
    known = _text(dataset, "PatientID") or (name and f"{name}\0{birth}")
    patient = known or _text(dataset, "StudyInstanceUID")
    telling = words.telling(_text(dataset, keyword) for keyword in _TELLING)
    if options.retain_institution:
        kept = ("InstitutionName", "InstitutionAddress", "InstitutionalDepartmentName")
        telling -= words.telling(_text(dataset, keyword) for keyword in kept)
    if options.retain_device:
        telling -= words.telling(_text(dataset, k) for k in ("StationName", "DeviceSerialNumber"))
    return Context(options, pseudonyms, patient, pseudonyms.shift_s(patient), telling)


def _text(dataset: Any, keyword: str) -> str:
    try:
        return " ".join(_values(dataset.get(keyword, ""))).strip(" \0")
    except BAD_VALUE:
        return ""


def treated(dataset: Any, context: Context) -> Dataset:
    """What may stay of `dataset`, at this level and in all sequences below it."""
    result = Dataset()
    for tag in sorted(dataset.keys()):
        try:
            element = _element(dataset, BaseTag(tag), context)
        except BAD_VALUE:
            # A value that cannot be read cannot be judged.
            continue
        if element is not None:
            result.add(element)
    return result


def _element(dataset: Any, tag: BaseTag, context: Context) -> DataElement | None:
    if tag.is_private:
        return _private(dataset, tag, context)
    # Command and file elements; curves and overlays with all that describes them.
    if tag.group in (0x0000, 0x0002, 0x0004) or tag.group >> 8 in (0x50, 0x60):
        return None
    if not dictionary_has_tag(tag) and tag not in table.rows():
        return None
    row = table.rows().get(tag)
    vr = dictionary_VR(tag) if dictionary_has_tag(tag) else ""
    keyword = keyword_for_tag(tag)
    if keyword in ("PatientName", "PatientID"):
        return _pseudonym(dataset, tag, vr, keyword, context)
    action = table.action(row, context.options) if row else _unlisted(keyword, vr, context)
    return _ACTIONS[action](dataset, tag, vr, context)


def _unlisted(keyword: str, vr: str, context: Context) -> table.Action:
    """Of attributes that the table does not name. Dates and UIDs go by their kind (E.3.6, E.1)."""
    if vr == "UI":
        return "uid"
    if vr in _WHEN:
        when: dict[str, table.Action] = {"shifted": "shift", "full": "keep", "none": "remove"}
        return when[context.options.retain_longitudinal]
    return "keep" if keyword in table.kept() else "remove"


def _pseudonym(
    dataset: Any, tag: BaseTag, vr: str, keyword: str, context: Context
) -> DataElement | None:
    own = _text(dataset, keyword)
    # At the top the patient is who the context says; in a sequence it may be somebody else.
    patient = own if keyword == "PatientID" and own else context.patient
    return DataElement(tag, vr, context.pseudonyms.patient(patient))


def _remove(dataset: Any, tag: BaseTag, vr: str, context: Context) -> DataElement | None:
    return None


def _empty(dataset: Any, tag: BaseTag, vr: str, context: Context) -> DataElement | None:
    return DataElement(tag, vr, Sequence() if vr == "SQ" else None) if vr else None


def _dummy(dataset: Any, tag: BaseTag, vr: str, context: Context) -> DataElement | None:
    if vr == "UI":
        return _uid(dataset, tag, vr, context)
    if vr in _DUMMIES:
        return DataElement(tag, vr, _DUMMIES[vr])
    return DataElement(tag, vr, "REMOVED") if vr in _TEXTS else _empty(dataset, tag, vr, context)


def _uid(dataset: Any, tag: BaseTag, vr: str, context: Context) -> DataElement | None:
    """Registered UIDs name classes and syntaxes; all others name something of this patient."""
    values = [
        v if v in UID_dictionary else context.pseudonyms.uid(v)
        for v in (text.strip(" \0") for text in _values(_value(dataset, tag, "UI")))
        if v
    ]
    return DataElement(tag, "UI", values[0] if len(values) == 1 else values or None)


def _items(dataset: Any, tag: BaseTag, vr: str, context: Context) -> DataElement | None:
    items = _value(dataset, tag, "SQ")
    cleaned = [treated(item, context) for item in items or () if not _private_code(item)]
    return DataElement(tag, "SQ", Sequence(cleaned))


def _private_code(item: Any) -> bool:
    """A hospital's own code (PS3.16 section 8.2) may mean anything, and say it in plain words."""
    scheme = _text(item, "CodingSchemeDesignator").upper()
    return scheme.startswith("99") or scheme == "L"


def _keep(dataset: Any, tag: BaseTag, vr: str, context: Context) -> DataElement | None:
    if vr == "SQ":
        return _items(dataset, tag, vr, context)
    value = _value(dataset, tag, vr)
    if vr in _NUMBERS or " or " in vr:
        return DataElement(tag, dataset[tag].VR, value)
    if keyword_for_tag(tag) in _STRUCTURAL:
        values = [words.code_string(text) for text in _values(value)]
    else:
        values = [_judged(text, vr, context) for text in _values(value)]
    return DataElement(tag, vr, values[0] if len(values) == 1 else values or None)


def _judged(text: str, vr: str, context: Context) -> str:
    """A kept text, or what stands for it where it is not what it should be."""
    if vr == "DA":
        return text if dates.is_date(text) else ""
    if vr == "TM":
        return text if dates.is_time(text) else ""
    if vr == "DT":
        return text if dates.is_moment(text) else ""
    if vr == "AS":
        return dates.capped_age(text)
    if words.tells(text, context.telling):
        return "OTHER" if vr == "CS" else ""
    return words.code_string(text) if vr == "CS" else text


def _shift(dataset: Any, tag: BaseTag, vr: str, context: Context) -> DataElement | None:
    """A date and its time of day are moved together, so that midnight is crossed once."""
    shift_s = context.shift_s
    own = _values(_value(dataset, tag, vr))
    if vr == "DA":
        times = _partner(dataset, tag)
        moved = [
            dates.shift_date(day, times[i] if len(times) == len(own) else "", shift_s)
            for i, day in enumerate(own)
        ]
    elif vr == "TM":
        moved = [dates.shift_time(time, shift_s) for time in own]
    elif vr == "DT":
        moved = [dates.shift_moment(moment, shift_s) for moment in own]
    else:
        # The offset from UTC is a place, and dates of other kinds cannot be moved.
        return None
    return DataElement(tag, vr, moved[0] if len(moved) == 1 else moved or None)


def _partner(dataset: Any, tag: BaseTag) -> list[str]:
    """The times of day that belong to a date, as the attributes' names say."""
    other = tag_for_keyword(keyword_for_tag(tag).replace("Date", "Time"))
    return (
        []
        if other is None or other not in dataset
        else _values(_value(dataset, BaseTag(other), "TM"))
    )


def _words(dataset: Any, tag: BaseTag, vr: str, context: Context) -> DataElement | None:
    if vr == "SQ":
        return _items(dataset, tag, vr, context)
    if vr not in _TEXTS:
        return _empty(dataset, tag, vr, context)
    cleaned = [words.technical_words(text) for text in _values(_value(dataset, tag, vr))]
    return DataElement(tag, vr, cleaned[0] if len(cleaned) == 1 else cleaned or None)


_Act = Callable[[Any, BaseTag, str, Context], "DataElement | None"]
_ACTIONS: dict[table.Action, _Act] = {
    "remove": _remove,
    "empty": _empty,
    "dummy": _dummy,
    "uid": _uid,
    "items": _items,
    "keep": _keep,
    "shift": _shift,
    "words": _words,
}


def _private(dataset: Any, tag: BaseTag, context: Context) -> DataElement | None:
    """Private attributes are removed, except a few that only hold a measure, and their creators."""
    if not context.options.retain_safe_private:
        return None
    block = tag.elem if 0x10 <= tag.elem <= 0xFF else tag.elem >> 8
    creator = _text_at(dataset, BaseTag((tag.group << 16) | block))
    safe = SAFE.get((tag.group, creator))
    if safe is None:
        return None
    if tag.elem == block:
        return DataElement(tag, "LO", creator)
    vr = safe.get(tag.elem & 0xFF)
    if vr is None or dataset[tag].VR != vr:
        return None
    if vr == "CS":
        kept = [_judged(text, vr, context) for text in _values(dataset[tag].value)]
        return DataElement(tag, vr, kept)
    return DataElement(tag, vr, dataset[tag].value)


def _text_at(dataset: Any, tag: BaseTag) -> str:
    return str(dataset[tag].value).strip() if tag in dataset else ""


def _value(dataset: Any, tag: BaseTag, vr: str) -> Any:
    """The value, where its kind is the one that the standard gives this attribute.

    A text written under the tag of a number would otherwise pass as a number.
    """
    element = dataset[tag]
    if element.VR not in vr.split(" or ") and element.VR != vr:
        raise ValueError(f"{tag} is a {element.VR} and should be a {vr}")
    return element.value


def _values(value: Any) -> list[str]:
    """One text a value; none for an empty attribute."""
    if value is None or value == "":
        return []
    # A person's name can be iterated too: letter by letter.
    if isinstance(value, str | PersonName) or not isinstance(value, Iterable):
        return [str(value)]
    return [str(v) for v in value]
