"""Made-up patients: what a scanner would see at any point of a body, in the patient's own space.

Anatomy is a function of a place in millimetres, so two hospitals that scan with other spacings and
orientations sample the same body, and image and mask agree wherever they are measured.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

BACKGROUND, LIVER, LESION = 0, 1, 2

# Mean CT numbers in HU (portal venous phase); the liver and its neighbours overlap on purpose.
AIR, GAS, FAT, SOFT = -1000.0, -650.0, -95.0, 42.0
BONE, VESSEL, KIDNEY, SPLEEN_OVER_LIVER = 320.0, 165.0, 170.0, 14.0


@dataclass(frozen=True, slots=True)
class Patient:
    """Shape of one abdomen; lengths in mm, places in DICOM patient axes (x left, y back, z head).

    scale: size of the whole body, 1 = average. centre: of the liver. radii: of the liver.
    waves: (6, 5) rows of amplitude, phase and direction that make the liver's surface uneven.
    liver_hu: mean CT number of the liver. lesion: (centre x, y, z, radius, contrast in HU) or None.
    """

    scale: float
    centre: Floats
    radii: Floats
    waves: Floats
    liver_hu: float
    lesion: Floats | None


def draw_patient(rng: np.random.Generator, lesion_share: float = 0.4) -> Patient:
    """One patient; `lesion_share` of them have a lesion in the liver."""
    scale = rng.uniform(0.88, 1.1)
    centre = scale * (np.array([-62.0, -14.0, 14.0]) + rng.normal(0, [7.0, 6.0, 9.0]))
    radii = scale * np.array([72.0, 64.0, 58.0]) * rng.uniform(0.85, 1.15, 3)
    waves = np.column_stack(
        [
            rng.uniform(0.02, 0.07, 6),
            rng.uniform(0, 2 * np.pi, 6),
            rng.normal(0, 2.2, (6, 3)),
        ]
    )
    lesion = None
    if rng.random() < lesion_share:
        radius = rng.uniform(12.0, 19.0)
        place = centre + rng.uniform(-0.4, 0.4, 3) * radii
        contrast = rng.choice([-45.0, 60.0])
        lesion = np.array([*place, radius, contrast])
    return Patient(scale, centre, radii, waves, rng.normal(106.0, 8.0), lesion)


def abdomen(patient: Patient, points: Floats) -> tuple[Floats, NDArray[np.uint8]]:
    """CT numbers without noise, and the mask.

    points: (..., 3) millimetres from the middle of the scan. Returns (...) HU and (...) with
    BACKGROUND, LIVER or LESION.
    """
    s = patient.scale
    x, y, z = (points[..., axis] / s for axis in range(3))
    skin = np.hypot(x / 152, y / 106)
    hu = np.where(skin < 1, FAT, AIR)
    hu[skin < 0.88] = SOFT
    hu[_ball(x, y, z, (62, -48, 28), (30, 24, 26)) < 1] = GAS
    hu[_ball(x, y, z, (96, 34, 30), (27, 37, 38)) < 1] = patient.liver_hu + SPLEEN_OVER_LIVER
    for side in (-58, 58):
        hu[_ball(x, y, z, (side, 50, -48), (22, 20, 42)) < 1] = KIDNEY
    hu[np.hypot(x - 6, y - 36) < 11] = VESSEL
    hu[np.hypot(x / 22, (y - 74) / 20) < 1] = BONE
    liver = _liver(patient, points) & (skin < 0.86) & (hu < BONE - 1)
    hu[liver] = patient.liver_hu
    mask = np.where(liver, LIVER, BACKGROUND).astype(np.uint8)
    if patient.lesion is not None:
        *place, radius, contrast = patient.lesion
        inside = liver & (np.linalg.norm(points - place, axis=-1) < radius)
        hu[inside] += contrast
        mask[inside] = LESION
    return hu, mask


def _ball(
    x: Floats, y: Floats, z: Floats, centre: tuple[float, ...], radii: tuple[float, ...]
) -> Floats:
    """Below 1 inside the ellipsoid."""
    squares = [((v - c) / r) ** 2 for v, c, r in zip((x, y, z), centre, radii, strict=True)]
    return np.asarray(np.sqrt(np.sum(squares, axis=0)))


def _liver(patient: Patient, points: Floats) -> NDArray[np.bool_]:
    """Inside an ellipsoid whose radius varies smoothly with the direction."""
    away = (points - patient.centre) / patient.radii
    distance = np.linalg.norm(away, axis=-1)
    direction = away / np.maximum(distance, 1e-6)[..., None]
    surface = np.ones(distance.shape)
    for amplitude, phase, *wave in patient.waves:
        surface += amplitude * np.sin(direction @ np.array(wave) + phase)
    return np.asarray(distance < surface)


def chest(rng: np.random.Generator, shape: tuple[int, int], opacity: bool) -> Floats:
    """A frontal chest radiograph with or without one opacity in a lung.

    Returns (rows, columns) in 0..1, dense tissue bright. What varies between patients (build,
    heart size, exposure, a side marker, noise) says nothing about the opacity.
    """
    rows, columns = np.meshgrid(
        np.linspace(-1, 1, shape[0]), np.linspace(-1, 1, shape[1]), indexing="ij"
    )
    build, shift = rng.uniform(0.88, 1.08), rng.uniform(-0.06, 0.06)
    y, x = rows / build, (columns - shift) / build
    image = 0.62 * _soft(1 - np.hypot(x / 0.95, (y - 0.15) / 1.25), 0.05)
    lungs = np.zeros(shape)
    for side in (-1, 1):
        lungs += _soft(1 - np.hypot((x - side * 0.43) / 0.31, (y + 0.08) / 0.68), 0.08)
    image -= 0.38 * lungs
    image += 0.05 * lungs * _soft(np.sin(17 * y + 5 * x**2 + rng.uniform(0, 6)), 0.4)
    heart = rng.uniform(0.24, 0.36)
    image += 0.25 * _soft(1 - np.hypot((x - 0.12) / heart, (y - 0.25) / 0.34), 0.1)
    image += 0.2 * _soft(1 - np.hypot(x / 0.1, y / 2), 0.2)
    patch = _opacity(rng, x, y) * lungs  # Drawn in any case, so that all else stays the same.
    if opacity:
        image += patch
    if rng.random() < 0.5:  # The side marker that radiographers put on the cassette.
        top, left = int(0.06 * shape[0]), int(rng.choice([0.05, 0.88]) * shape[1])
        image[top : top + 5, left : left + 4] = 1.0
    image = rng.uniform(0.8, 1.1) * image + rng.uniform(0.0, 0.08)
    return np.clip(image + rng.normal(0, 0.03, shape), 0.0, 1.0)


def _opacity(rng: np.random.Generator, x: Floats, y: Floats) -> Floats:
    """A blurred patch in the left or right lung, 0.2 to 0.4 above the lung."""
    side = rng.choice([-1, 1])
    cx, cy = side * rng.uniform(0.36, 0.52), rng.uniform(-0.45, 0.35)
    width, height = rng.uniform(0.15, 0.26, 2)
    patch = np.exp(-(((x - cx) / width) ** 2) - ((y - cy) / height) ** 2)
    return np.asarray(rng.uniform(0.2, 0.4) * patch)


def _soft(level: Floats, width: float) -> Floats:
    """A step from 0 (level below 0) to 1 (above) that is about `width` wide."""
    return np.asarray(1 / (1 + np.exp(-np.clip(level / width * 4, -40, 40))))
