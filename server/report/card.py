"""What the model card says beyond the report: front matter and how to load the weights."""

from __future__ import annotations

from typing import Any

from medfl.common.models import MODELS
from medfl.server.report import words
from medfl.server.report.run import Run

_PIPELINES = {
    "segmentation": "image-segmentation",
    "classification": "image-classification",
    "risk": "tabular-classification",
}


def card_context(run: Run, shared: dict[str, Any]) -> dict[str, Any]:
    """The report's rows, plus the Hugging Face front matter.

    Hugging Face, "Model Cards", metadata keys license, library_name, tags and pipeline_tag.
    """
    images = run.study.image is not None
    entry = MODELS.get(run.study.model.name)  # None: a network of another version's catalogue
    monai = entry is not None and entry.needs.startswith("monai")
    kind = run.study.task.kind
    private = run.epsilons.values()
    return {
        **shared,
        "library": "monai" if monai else "pytorch",
        "pipeline": _PIPELINES[kind] if images else "tabular-classification",
        "tags": ["medfl", "federated-learning", "medical", kind,
                 *(["differential-privacy"] if private or run.site_epsilon else [])],
        "input": _input(run),
        "classes": run.study.task.classes,
        "model": run.study.model.name,
        "weights": _weights(run),
        "epsilon": words.epsilon(max(private)) if private else None,
        "delta": words.small_number(max((s.delta or 0.0 for s in run.private_sites), default=None)),
        "unit": run.study.privacy.unit if run.study.privacy else "patient",
        "model_digest": str((run.facts.get("digests") or {}).get("model", words.NONE)),
    }  # fmt: skip


def _weights(run: Run) -> str:
    """The weights' file beside the card; the name that medfl gives it if it lies elsewhere."""
    found = sorted(path.name for path in run.folder.glob("*.safetensors"))
    return "model.safetensors" if not found or "model.safetensors" in found else found[0]


def _input(run: Run) -> str:
    image, record = run.study.image, run.study.record
    if image is not None:
        size = " × ".join(map(str, image.size))
        spacing = " × ".join(f"{s:g}" for s in image.spacing_mm or ())
        spacing = f", {spacing} mm" if spacing else ""
        return (
            f"{image.dimensions}-D images, {size} voxels{spacing}, {image.channels} "
            f"channel{'s' if image.channels > 1 else ''}, intensity {image.intensity}"
        )
    names = [f.name for f in record.features] if record is not None else []
    return f"Records of {len(names)} features: {', '.join(names)}"
