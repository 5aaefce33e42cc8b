"""How the three hospitals differ: scanners, archives, tables, patients, and what went wrong."""

from __future__ import annotations

from dataclasses import dataclass

from pydicom.uid import (
    UID,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
)

AXIAL = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0))
CORONAL = ((1.0, 0.0, 0.0), (0.0, 0.0, -1.0))


@dataclass(frozen=True, slots=True)
class Table:
    """How a hospital writes its list of cases.

    columns: its names for patient, case, image and mask or label, in this order of keys.
    header: whether the first line holds the names.
    """

    file: str
    columns: dict[str, str]
    delimiter: str = ","
    header: bool = True


@dataclass(frozen=True, slots=True)
class Ct:
    """A CT scanner and its archive.

    shape: slices, rows, columns. spacing_mm: between slices, rows, columns. thickness_mm: what
        SliceThickness says. axes: ImageOrientationPatient, as row and column cosines.
    downwards: InstanceNumber rises against the slice normal. signed: stored as two's complement.
    bits: stored bits.
    padding: stored value outside the round field of view, or None.
    canonical_mask: masks are saved in RAS+ voxel order; else in the order of the pixels.
    damage: (what, number of the case), by the functions of `medfl.simulations.hospitals.ct`.
    """

    cases: int
    small_cases: int
    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    thickness_mm: float
    axes: tuple[tuple[float, float, float], tuple[float, float, float]]
    downwards: bool
    slope: float
    intercept: float
    signed: bool
    bits: int
    padding: int | None
    syntax: UID
    noise_hu: float
    suffix: str
    canonical_mask: bool
    table: Table
    damage: tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class Xray:
    """A radiography unit. positive: share of images with an opacity. labels: texts of no and yes.

    bits: stored bits. damage: (what, number of the image).
    """

    images: int
    small_images: int
    shape: tuple[int, int]
    bits: int
    modality: str
    photometric: str
    syntax: UID
    positive: float
    labels: tuple[str, str]
    suffix: str
    table: Table
    damage: tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class Records:
    """The records of a hospital's wards. labels: texts of no and yes.

    older_sd: how many standard deviations older its patients are. log_odds: of the outcome for a
    patient in the middle of all fields.
    """

    patients: int
    small_patients: int
    older_sd: float
    log_odds: float
    labels: tuple[str, str]
    table: Table


@dataclass(frozen=True, slots=True)
class Hospital:
    """One hospital. number: pattern of its patient numbers.

    privacy: (epsilon, delta) that it works under in the studies that have enough patients for it
    (`medfl.simulations.hospitals.make_hospitals`), or None.
    """

    name: str
    institution: str
    number: str
    families: tuple[str, ...]
    privacy: tuple[float, float] | None
    ct: Ct
    xray: Xray
    records: Records


# What a study calls the fields, and what two of the hospitals call them.
RECORD_FIELDS = (
    "age",
    "systolic",
    "heart_rate",
    "creatinine",
    "haemoglobin",
    "sodium",
    "crp",
    "albumin",
    "bmi",
    "potassium",
    "glucose",
    "leucocytes",
    "platelets",
    "bilirubin",
    "days",
)
_GERMAN = tuple(
    "Alter RR Puls Kreatinin Hb Natrium CRP Albumin BMI Kalium Glukose Leukozyten Thrombozyten "
    "Bilirubin Tage".split()
)
_FRENCH = tuple("age pas fc creat hb na crp albumine imc k glyc leuco plaq bili jours".split())

ST_MARIEN = Hospital(
    name="st-marien",
    institution="Krankenhaus St. Marien",
    number="00{:05d}",  # Read as a number, the zeros would be lost.
    families=("Muster", "Beispiel", "Schmidt", "Weber", "Fischer"),
    privacy=None,
    ct=Ct(
        cases=32,
        small_cases=8,
        shape=(16, 40, 40),
        spacing_mm=(10.0, 8.0, 8.0),
        thickness_mm=10.0,
        axes=AXIAL,
        downwards=False,
        slope=1.0,
        intercept=-1024.0,
        signed=False,
        bits=12,
        padding=None,
        syntax=ExplicitVRLittleEndian,
        noise_hu=16.0,
        suffix=".dcm",
        canonical_mask=True,
        table=Table(
            "faelle.csv",
            {
                "patient": "Patientennummer",
                "case": "Untersuchung",
                "image": "Serie",
                "mask": "Maske",
            },
            delimiter=";",
        ),
        damage=(
            ("patient_returns", 1),
            ("patient_returns", 2),
            ("truncated_slice", 4),
            ("slice_missing", 6),
        ),
    ),
    xray=Xray(
        images=160,
        small_images=20,
        shape=(80, 80),
        bits=12,
        modality="DX",
        photometric="MONOCHROME2",
        syntax=ImplicitVRLittleEndian,
        positive=0.3,
        labels=("nein", "ja"),
        suffix=".dcm",
        table=Table(
            "labels.csv",
            {
                "patient": "Patientennummer",
                "case": "Untersuchung",
                "image": "Datei",
                "label": "Verschattung",
            },
            delimiter=";",
        ),
        damage=(("truncated", 5), ("text_instead", 11)),
    ),
    records=Records(
        patients=400,
        small_patients=60,
        older_sd=0.5,
        log_odds=-0.8,
        labels=("nein", "ja"),
        table=Table(
            "patienten.csv",
            {"patient": "Patientennummer", "label": "Wiederaufnahme"}
            | dict(zip(RECORD_FIELDS, _GERMAN, strict=True)),
            delimiter=";",
        ),
    ),
)

RIVERSIDE = Hospital(
    name="riverside",
    institution="Riverside General Hospital",
    number="MRN{:06d}",
    families=("Sample", "Doe", "Example", "Brown", "Walker"),
    privacy=(8.0, 1e-3),
    ct=Ct(
        cases=36,
        small_cases=16,
        shape=(12, 48, 48),
        spacing_mm=(13.0, 7.0, 7.0),
        thickness_mm=16.0,  # Overlapping slices: the distance is in the positions alone.
        axes=AXIAL,
        downwards=True,
        slope=1.0,
        intercept=0.0,
        signed=True,
        bits=16,
        padding=-2000,
        syntax=RLELossless,
        noise_hu=24.0,
        suffix="",
        canonical_mask=False,
        table=Table(
            "cases.csv",
            {
                "patient": "mrn",
                "case": "accession",
                "image": "series_folder",
                "mask": "segmentation",
            },
        ),
        damage=(("duplicate_series", 3), ("empty_slice", 6)),
    ),
    xray=Xray(
        images=170,
        small_images=24,
        shape=(64, 64),
        bits=8,
        modality="CR",
        photometric="MONOCHROME2",
        syntax=RLELossless,
        positive=0.5,
        labels=("0", "1"),
        suffix=".dcm",
        table=Table(
            "labels.csv",
            {"patient": "mrn", "case": "accession", "image": "file", "label": "opacity"},
        ),
        damage=(("empty_file", 7), ("duplicate_image", 12)),
    ),
    records=Records(
        patients=2400,
        small_patients=200,
        older_sd=0.0,
        log_odds=-0.5,
        labels=("0", "1"),
        table=Table(
            "patients.csv",
            {"patient": "mrn", "label": "readmitted"} | {f: f for f in RECORD_FIELDS},
        ),
    ),
)

HOPITAL_NORD = Hospital(
    name="hopital-nord",
    institution="Hôpital Nord",
    number="NIP-{:05d}",
    families=("Exemple", "Martin", "Durand", "Lefèvre", "Moreau"),
    privacy=None,
    ct=Ct(
        cases=30,
        small_cases=8,
        shape=(18, 24, 44),
        spacing_mm=(13.0, 6.5, 7.5),
        thickness_mm=6.0,  # Gaps between slices.
        axes=CORONAL,
        downwards=False,
        slope=0.5,
        intercept=-1100.0,
        signed=False,
        bits=13,
        padding=None,
        syntax=JPEGLSLossless,
        noise_hu=20.0,
        suffix=".ima",
        canonical_mask=True,
        table=Table(
            "cas.csv",
            {"patient": "numero", "case": "examen", "image": "serie", "mask": "masque"},
            delimiter="\t",
            header=False,
        ),
        damage=(("mask_of_another_shape", 2), ("mask_missing", 5), ("stray_text_file", 6)),
    ),
    xray=Xray(
        images=160,
        small_images=20,
        shape=(96, 80),
        bits=10,
        modality="CR",
        photometric="MONOCHROME1",
        syntax=JPEG2000Lossless,
        positive=0.7,
        labels=("non", "oui"),
        suffix=".dcm",
        table=Table(
            "labels.csv",
            {"patient": "numero", "case": "examen", "image": "fichier", "label": "opacite"},
            delimiter="\t",
        ),
        damage=(("label_missing", 9),),
    ),
    records=Records(
        patients=400,
        small_patients=60,
        older_sd=-0.7,
        log_odds=-0.2,
        labels=("non", "oui"),
        table=Table(
            "patients.csv",
            {"patient": "numero", "label": "readmission"}
            | dict(zip(RECORD_FIELDS, _FRENCH, strict=True)),
            delimiter="\t",
        ),
    ),
)

HOSPITALS = (ST_MARIEN, RIVERSIDE, HOPITAL_NORD)
