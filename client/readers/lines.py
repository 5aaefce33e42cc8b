"""Lines of a table and the images that they speak of: joined by the mapped key alone.

A key column holds one kind of name. `image` names a file or folder, `instance`, `series` and
`study` a UID, `accession` an accession number, `patient` a patient; `case` may hold any of them,
and then a name that means two things is ambiguous. `image` and the UIDs and accession numbers that
a line fills in all have to fit; `case` is a key only in a line without those, `patient` only in one
without `case`, too.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from medfl.client.data.cases import CaseRef, Quarantined
from medfl.common.codes import difference, folded, level
from medfl.common.source import DataSource
from medfl.common.study import Study

Row = Mapping[str, str]
# The names of one image, by the columns that can hold them; within a kind the most exact first.
# "copies": files and folders of its copies elsewhere.
Names = Mapping[str, Sequence[str]]
# By a line's number, the kinds of name through which an image found it.
Hits = dict[int, set[str]]
Form = Callable[[str], str]

# These are keys only where site.toml maps a column: others call columns of other content so.
_MAPPED = ("instance", "series", "study", "accession")
_KEYS = ("image", *_MAPPED)
_UIDS = ("instance", "series", "study")


@dataclass(frozen=True, slots=True)
class Line:
    """A table's line with its key: pairs of column and text. row: under the study's names."""

    number: int
    key: tuple[tuple[str, str], ...]
    row: Row

    @property
    def name(self) -> str:
        return self.key[0][1] if self.key else f"row {self.number}"


def used(fields: Row, source: DataSource, study: Study) -> tuple[str | None, ...]:
    """What a study takes from a line; lines that agree in it may stand for one another."""
    task = study.task
    names = ["patient", "mask"] if task.kind == "segmentation" else ["patient", "label"]
    names += task.classes if task.multi_label else []
    names += [f.name for f in study.record.features] if study.record is not None else []
    names += ["split"] if study.evaluation.split == "given" else []
    return tuple(fields.get(n, fields.get(source.column(n))) for n in names)


def lines_of(rows: Sequence[Row], source: DataSource) -> list[Line]:
    """The rows of a table with their keys."""
    mapped = source.columns or {}
    keys = [k for k in _KEYS if k not in _MAPPED or k in mapped]
    lines = []
    for number, row in enumerate(rows, 1):
        key = [(k, _plain(row[k])) for k in keys if row.get(k)]
        key = key or [(k, _plain(row[k])) for k in ("case", "patient") if row.get(k)][:1]
        lines.append(Line(number, tuple(key), row))
    return lines


def _plain(name: str) -> str:
    return name.removeprefix("./").rstrip("/")


def join(
    cases: Sequence[CaseRef],
    names: Sequence[Names],
    lines: Sequence[Line],
    source: DataSource,
    study: Study,
) -> tuple[list[CaseRef], list[Quarantined], list[Line]]:
    """Each case with its line; what is left out; the lines that no case has.

    names: of each case. A case without a line is no part of the study; where several lines belong
    to it and disagree in what the study uses, or where one line's name means different cases,
    nothing says which is right. "1.0" is "1" only for lines and cases that are left over.
    """
    written = _index(lines, str)
    hits = [_hits(own, written, str) for own in names]
    reached = {number for hit in hits for number in hit}
    left = [line for line in lines if line.number not in reached]
    coded = _index(left, level)
    respelled = {}
    for place, own in enumerate(names):
        if not hits[place] and (hit := _hits(own, coded, level)):
            hits[place] = respelled[place] = hit
    alike = {folded(line.name): line for line in left}
    unclear = _with_two_meanings(hits)
    by_number = {line.number: line for line in lines}
    joined: list[CaseRef] = []
    aside: list[Quarantined] = []
    told: set[int] = {number for hit in hits for number in hit}
    for place, (ref, hit) in enumerate(zip(cases, hits, strict=True)):
        own_lines = [by_number[n] for n in sorted(hit)]
        if not own_lines:
            like = next((alike[f] for n in _all(names[place]) if (f := folded(n)) in alike), None)
            told |= {like.number} if like else set()
            aside.append(_unlisted(ref, names[place], like))
        elif detail := _ambiguity(own_lines, unclear, source, study):
            aside.append(Quarantined(ref.case_id, "ambiguous_line", detail))
        else:
            row = own_lines[0].row
            patient = row.get("patient") or ref.patient
            fields = {**row, **ref.fields}
            joined.append(
                replace(ref, patient=patient, fields=fields, respelled=place in respelled)
            )
    return joined, aside, [line for line in lines if line.number not in told]


def _index(lines: Sequence[Line], form: Form) -> dict[tuple[str, str], list[Line]]:
    index: dict[tuple[str, str], list[Line]] = defaultdict(list)
    for line in lines:
        for column, text in line.key[:1]:
            index[column, form(text)].append(line)
    return index


def _hits(own: Names, index: Mapping[tuple[str, str], list[Line]], form: Form) -> Hits:
    """The lines of one image, each with the kinds of name that led to it.

    form: how texts are compared, `str` (as written) or `level` (as codes: "1.0" is "1").
    """
    hits: Hits = defaultdict(set)
    for column, kind, names in _ways(own):
        found = next((index[column, form(n)] for n in names if (column, form(n)) in index), [])
        for line in found:
            rest = [form(text) in {form(n) for n in own.get(k, ())} for k, text in line.key[1:]]
            if all(rest):
                hits[line.number].add(kind)
    return hits


def _ways(own: Names) -> Iterator[tuple[str, str, Sequence[str]]]:
    """Column, kind of name and the names, most exact first, by which a line can find an image."""
    for key in ("image", *_MAPPED, "patient"):
        yield key, key, own.get(key, ())
    yield "image", "image", own.get("copies", ())
    uids = [uid for kind in _UIDS for uid in own.get(kind, ())]
    by_kind = {"uid": uids, **{k: own.get(k, ()) for k in ("image", "accession", "patient")}}
    for kind, names in by_kind.items():
        yield "case", kind, names


def _all(own: Names) -> list[str]:
    return [name for names in own.values() for name in names]


def _with_two_meanings(hits: Sequence[Hits]) -> set[int]:
    """Lines whose name is one image's of one kind and another image's of another kind."""
    reached: dict[int, dict[str, set[int]]] = defaultdict(lambda: defaultdict(set))
    for place, hit in enumerate(hits):
        for number, kinds in hit.items():
            for kind in kinds:
                reached[number][kind].add(place)
    return {n for n, kinds in reached.items() if len({frozenset(p) for p in kinds.values()}) > 1}


def _ambiguity(own: Sequence[Line], unclear: set[int], source: DataSource, study: Study) -> str:
    """Why nothing says which line is a case's; "" where it is clear."""
    if any(line.number in unclear for line in own):
        return f"{own[0].name!r} is the name of one image and another name of a second one"
    if len({used(line.row, source, study) for line in own}) > 1:
        rows = ", ".join(str(line.number) for line in own[:5])
        return f"the rows {rows} belong to it and disagree"
    return ""


def _unlisted(ref: CaseRef, own: Names, like: Line | None) -> Quarantined:
    if like is None:
        return Quarantined(ref.case_id, "not_in_table")
    name = next(n for n in _all(own) if folded(n) == folded(like.name))
    return Quarantined(ref.case_id, "name_differs", difference(like.name, name, "image"))


def disagreeing(refs: Sequence[CaseRef], source: DataSource, study: Study) -> bool:
    """Whether several lines for one case say different things, or name different files."""
    files = {ref.files for ref in refs} if source.table is not None else set()
    return len(files) > 1 or len({used(ref.fields, source, study) for ref in refs}) > 1
