"""Texts: what may stay of a description, and what names somebody."""

from __future__ import annotations

import re
from collections.abc import Iterable

# What a description of an examination is made of when it names nobody and no place.
TECHNICAL = frozenset(
    """
    abdomen ac adc add angio ankle aorta ap apical ascending asl ax axial axis b0 blade body
    bold bone brachial brain breast calf cardiac cervical chest cine colon contrast cor coronal
    cr ct cta ctv cube deep delayed descending diff diffusion dixon dti dual dwi dx dynamic ecg
    echo elbow epi ew expiration fast fat femoral femur ffe fgre fiesta field fl2d fl3d flair
    flash fmri foot forearm fov fse fspgr gated gd gradient gre haste head heart hip hr humerus
    in inspiration inversion ir iso joint kidney knee lao lat lateral left leg liver localizer
    long lower lumbar lung mag mammo map mask med medium mip ml mlo mono motion mp2rage mpr
    mprage mr mra mri ms navigator neck neuro nm non oblique opp orbit pa pancreas pc pd pelvis
    perf perfusion pet phase post posterior pre propeller prostate pulmonary ra rao raw recon
    renal resolve rest resting right sag sagittal sat scan scout se short shoulder sinus skull
    slab slice small soft space spgr spin spine spleen spoiled stir stress survey swi t1 t1w t2
    t2star t2w task te test tfe thick thin thoracic thorax thyroid ti tibia time tissue tof
    topogram tr tra trans transverse tse turbo ultra upper us uterus vein vibe view vol volume
    water whole wrist xa xr
    """.split()
)
_WORD = re.compile(r"[^\W_]+")
_CODE_STRING = re.compile(r"[A-Z0-9 _]{0,16}")
# Shorter parts of a name are words of their own in too many places (CT, MR, AX).
_SHORTEST = 4


def technical_words(text: str) -> str:
    """The words of a description that are in the vocabulary, in lower case."""
    return " ".join(w for w in _WORD.findall(text.lower()) if w in TECHNICAL)


def code_string(text: str) -> str:
    """A CS value as it is, or OTHER where it is none (PS3.5 section 6.2)."""
    return text if _CODE_STRING.fullmatch(text.strip()) else "OTHER"


def telling(values: Iterable[str]) -> frozenset[str]:
    """The words of names and numbers that identify, in lower case."""
    words = {w for value in values for w in _WORD.findall(value.lower())}
    return frozenset(w for w in words if len(w) >= _SHORTEST)


def tells(text: str, words: frozenset[str]) -> bool:
    """Does `text` hold one of the words that identify?"""
    return not words.isdisjoint(_WORD.findall(text.lower()))
