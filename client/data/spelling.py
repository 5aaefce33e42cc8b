"""Notes on names and codes that a spreadsheet or another system may have written otherwise."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from medfl.client.data.cases import CaseRef
from medfl.common.codes import folded, level
from medfl.common.source import DataSource
from medfl.common.study import Study


def spelling_notes(refs: Sequence[CaseRef], source: DataSource, study: Study) -> tuple[str, ...]:
    """What a hospital should look at, in counts.

    Patients' numbers that only look alike count as different patients, so that one of them may be
    in the training part and the other in the test part.
    """
    notes = []
    patients: dict[str, set[str]] = defaultdict(set)
    for patient in {ref.patient for ref in refs}:
        patients[folded(patient)].add(patient)
    alike = sum(len(names) for names in patients.values() if len(names) > 1)
    if alike:
        notes.append(
            f"{alike} patients' numbers look like another one but for leading zeros, capitals, "
            "blanks or the form of accented letters. They count as different patients; if they "
            "are the same, write them alike, or one patient may be in training and test."
        )
    respelled = sum(ref.respelled for ref in refs)
    if respelled:
        notes.append(
            f'{respelled} cases have a line only because "1.0" counts as "1" where nothing else '
            "agrees. Format the column of a spreadsheet as text."
        )
    codes = _respelled_codes(refs, source, study)
    if codes:
        notes.append(
            f'{codes} labels or categories are written as "1.0" and count as "1", as the study has '
            "them. Format the column of a spreadsheet as text."
        )
    return tuple(notes)


def _respelled_codes(refs: Sequence[CaseRef], source: DataSource, study: Study) -> int:
    known: dict[str, set[str]] = {}
    if study.task.kind != "segmentation" and not study.task.multi_label:
        known["label"] = {*study.task.classes, *(study.task.label_map or {})}
    for feature in study.record.features if study.record is not None else ():
        if feature.kind == "category":
            known[feature.name] = set(feature.levels or ())
    texts = [
        (text, codes)
        for ref in refs
        for name, codes in known.items()
        if (text := ref.fields.get(name, ref.fields.get(source.column(name), "")).strip())
    ]
    return sum(text not in codes and level(text) != text for text, codes in texts)
