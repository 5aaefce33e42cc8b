"""A hospital's own words for structures and mask values: `values.mask` of site.toml."""

from __future__ import annotations

from dataclasses import replace

from medfl.common.errors import DataError
from medfl.common.source import DataSource
from medfl.common.study import Study


def with_mask_words(study: Study, source: DataSource) -> Study:
    """The study as this hospital's masks are read: its words come before those of `label_map`.

    A word may stand for a class or for a word that the study maps.

    Raises:
        DataError: a word stands for neither.
    """
    words = (source.values or {}).get("mask") if study.task.kind == "segmentation" else None
    if not words:
        return study
    known = {**(study.task.label_map or {}), **{name: name for name in study.task.classes}}
    for word, name in words.items():
        if name not in known:
            raise DataError(
                f"values.mask of site.toml: {word!r} stands for {name!r}, which is none of the "
                f"study's classes {study.task.classes}. Correct it there."
            )
    mapped = {word: known[name] for word, name in words.items()}
    task = replace(study.task, label_map={**(study.task.label_map or {}), **mapped})
    return replace(study, task=task)
