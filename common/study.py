"""study.toml: the agreement between the hospitals. Its digest is what everybody signs."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from medfl.common import config
from medfl.common.codes import level
from medfl.common.source import DataSource
from medfl.common.written import (
    Count,
    Finite,
    Fraction,
    Name,
    NotNegative,
    Option,
    Positive,
    Share,
    written,
)

TaskKind = Literal["classification", "segmentation", "risk"]


@written
class Task:
    """What is predicted.

    classes: names in the order of the model's outputs. Segmentation: background first, mask value
        k is class k. Two classes of a classification or a risk: the second is the positive one.
    label_map: values found in the hospitals' files -> class name, where they differ; a mask's
        numbers ("128") or colours ("#ff0000") as the file stores them; a structure's label or code
        ("SCT:10200004"), or "*" for every structure that is not named otherwise.
    multi_label: a case may have any number of the classes (classification only); the label
        column then lists class names separated by `|`, or there is one 0/1 column a class.
    """

    kind: TaskKind
    classes: list[str]
    label_map: dict[str, str] | None = None
    multi_label: bool = False


@written
class ImageInput:
    """How every hospital turns its images into the same network input.

    size: voxels of the network input, in the order of `orientation` (2-D: rows, columns).
    spacing_mm: resample to this; omitted, images keep their own spacing.
    orientation: anatomical axes of a volume, such as RAS (nibabel's letters); 2-D has none.
    fit: pad_crop centres the image in `size`; resize scales it; keep leaves each image its own
        size (training then takes random patches of `size`, evaluation slides a window).
    intensity: zscore = each image to mean 0, sd 1; range = `window` to 0..1 (HU for CT);
        percentiles = each image's 0.5 to 99.5 percentile to 0..1; federated = one mean and sd of
        all hospitals, from the prepare exchange; none = stored values.
    dark_background: turn images whose background is bright (median above mid-range) over.
    """

    dimensions: Literal[2, 3]
    size: list[Count]
    channels: Count = 1
    spacing_mm: list[Positive] | None = None
    orientation: str = "RAS"
    fit: Literal["pad_crop", "resize", "keep"] = "pad_crop"
    intensity: Literal["zscore", "range", "percentiles", "federated", "none"] = "zscore"
    window: tuple[Finite, Finite] | None = None
    dark_background: bool = False


@written
class Feature:
    """One field of a record.

    unit: of a number, as the hospitals are to give it, such as "mg/dl"; shown by their checks.
    range: plausible values of a number, [low, high]. What lies beyond counts as missing.
    scale_range: the numbers that scale = "range" turns into -1 and 1; omitted, those of `range`.
    levels: codes of a category; omitted, the prepare exchange collects them from all hospitals.
    """

    name: str
    kind: Literal["number", "category"] = "number"
    unit: str | None = None
    range: tuple[Finite, Finite] | None = None
    scale_range: tuple[Finite, Finite] | None = None
    levels: list[str] | None = None

    @property
    def ends(self) -> tuple[float, float] | None:
        """The numbers that become -1 and 1 under scale = "range"."""
        return self.scale_range or self.range


@written
class RecordInput:
    """How every hospital turns its records into the same numbers.

    scale: federated = mean and sd over all hospitals' training records, from sums in the prepare
        exchange; site = each hospital's own; range = the study's ranges become -1..1 and
        0/1 columns -1/2 and 1/2, which costs no privacy because nobody's data is read for it;
        none = as they are.
    missing: drop = leave the record out; mean = fill with the scaled middle (0); indicator = fill
        and add a 0/1 column that says so. A number beyond its feature's range is missing, too.
    """

    features: list[Feature]
    scale: Literal["federated", "site", "range", "none"] = "federated"
    missing: Literal["drop", "mean", "indicator"] = "drop"


@written
class Model:
    """The network, by its name in the catalogue (`medfl.common.models`).

    options: the catalogue entry's own options, such as channels or depth.
    start_weights: a local safetensors file to start from (fine-tuning), with its SHA-256, so that
        every hospital starts from the same.
    freeze: parameters that stay as they are, by the beginning of their names.
    """

    name: str
    options: dict[str, Option] | None = None
    start_weights: Path | None = None
    start_weights_sha256: str | None = None
    freeze: tuple[str, ...] = ()


@written
class Augmentation:
    """One random transform of the catalogue (`medfl.client.training.augment`)."""

    name: str
    probability: Share = 0.5
    options: dict[str, Option] | None = None


@written
class Training:
    """What a hospital does between two exchanges.

    Exactly one of local_steps (optimiser steps a round) and local_epochs (passes a round).
    schedule: learning rate over the *whole* federation's rounds, not one round's steps.
    class_weights: for the weighted losses, in the order of the classes; omitted where the loss
        needs them, they come from the prepare exchange's class counts.
    threads: CPU threads a training process uses; part of the study because float sums differ
        with it, and results must not depend on the machine.
    """

    optimiser: Literal["sgd", "adam", "adamw"] = "sgd"
    learning_rate: Positive = 0.01
    momentum: Fraction = 0.0
    weight_decay: NotNegative = 0.0
    batch_size: Count = 32
    local_steps: Count | None = None
    local_epochs: Count | None = None
    loss: Literal["cross_entropy", "weighted_cross_entropy", "focal", "dice", "dice_ce"] = (
        "cross_entropy"
    )
    class_weights: list[Positive] | None = None
    focal_gamma: NotNegative = 2.0
    schedule: Literal["constant", "cosine", "step", "linear"] = "constant"
    warmup_rounds: int = 0
    final_fraction: Fraction = 0.0
    augment: list[Augmentation] | None = None
    clip_gradient: Positive | None = None
    mixed_precision: Literal["auto", "off"] = "auto"


@written
class Federation:
    """How the hospitals' updates become the next model.

    strategy, options: an entry of the catalogue (`medfl.strategies`) and its settings.
    weighting: a hospital's say in the mean: its training cases, their square root (between the
        two: small hospitals count more than their cases, and less than equally), or equal.
    min_sites: fewer answers than this, and the round is void.
    sites_per_round: so many are drawn each round; omitted, all take part.
    keep: which model is published: the last, the best by `best_metric` on validation parts (mean
        over the hospitals that both rounds have it of; the earlier of equals; with sites_per_round
        only rounds that the same hospitals judged are compared), or the average of the models of
        the second half of the rounds, which has less of privacy's noise.
    patience: training ends early once so many models in a row are no better by `best_metric` than
        the best, compared as `keep` compares them; omitted, all rounds are trained. What noised
        metrics of all rounds may cost (privacy.metrics_epsilon) covers it: it reads nothing else.
    updates: numbers in which updates travel (`medfl.common.packing`), all packed without loss:
        float32 as they are, float16 in half the bytes, int8 in a quarter and int4 in an eighth,
        where each hospital keeps what rounding took away and adds it to its next update. Under
        differential privacy this is post-processing and changes no epsilon.
    norm_limit: an update longer than so many times the median update of the round before is left
        out. It is for what is out of all proportion: noise of differential privacy alone can make
        an honest update tens of times longer than another hospital's.
    """

    rounds: Count
    strategy: str = "fedavg"
    options: dict[str, Option] | None = None
    weighting: Literal["cases", "sqrt_cases", "equal"] = "cases"
    min_sites: Count = 1
    sites_per_round: Count | None = None
    keep: Literal["last", "best", "average"] = "last"
    best_metric: str | None = None
    patience: Count | None = None
    updates: Literal["float32", "float16", "int8", "int4"] = "float32"
    norm_limit: Annotated[float, Field(gt=1)] = 100.0


@written
class SecureAggregation:
    """The coordinator learns the sum of the hospitals' updates and no single one.

    It serves strategies that need only the sum. Numbers travel as integers: federation.updates
    says in how many bytes (float32: 4, float16: 3, int8 and int4: 2), and the step between two of
    them is 2 * range * sites / 256^bytes.

    threshold: more than this share of a round's hospitals must be there to the end of it, or it is
        void. Two thirds bear a coordinator that tells hospitals different things; below half is no
        protection, and is refused.
    range: what a parameter may change in a round; beyond it the change is cut off.
    control_range: the same of a control variate (scaffold).
    max_norm: an update whose L2 norm is longer is shortened to it, by the hospital itself: the
        coordinator cannot see how long one is.
    """

    threshold: Annotated[float, Field(ge=0.5, lt=1)] = 2 / 3
    range: Positive = 1.0
    control_range: Positive | None = None
    max_norm: Positive | None = None


@written
class Privacy:
    """Differential privacy that every hospital trains under; a hospital may ask for more.

    epsilon, delta: for the whole study, all rounds together, per `unit`.
    unit: patient = a patient with all of their records, however many; record = each record (image,
        row) alone, which protects a patient with several of them less.
    clip: bound on the L2 norm of one unit's contribution.
    clip_quantile: the bound follows this share of the units' norms, at each hospital its own: as
        many units should need no clipping. What a hospital learns of the norms is noised and within
        epsilon; the noise on the gradients grows by 2.6 % for it. `clip` is then where it begins.
    sample_rate: chance of a unit to take part in a step; omitted, training.batch_size over the
        units that the hospital declares. A rate gives hospitals of every size the same noise.
    metrics_epsilon: what the metrics on validation and test patients may cost each of *those*
        patients, all rounds together, at the same delta; they are released with noise. Omitted,
        a private hospital reports no metrics.
    """

    epsilon: Positive
    delta: Positive
    clip: Positive = 1.0
    clip_quantile: Annotated[float, Field(gt=0, lt=1)] | None = None
    sample_rate: Annotated[float, Field(gt=0, le=1)] | None = None
    unit: Literal["patient", "record"] = "patient"
    metrics_epsilon: Positive | None = None


@written
class SiteLevelPrivacy:
    """Differential privacy of whole hospitals, by noise of the coordinator (`[site_privacy]`).

    It bounds what the models tell about all patients of one hospital together, to everybody but
    the coordinator. It is for studies of many hospitals, and beside [privacy], not instead of it.

    epsilon, delta: for the whole study, all rounds together, per hospital.
    clip: bound on the L2 norm of one hospital's update of a round.
    sites: hospitals that are expected. The noised sum is divided by this number, and not by that
        of those who answered.
    """

    epsilon: Positive
    delta: Positive
    sites: Count
    clip: Positive = 1.0


@written
class Evaluation:
    """Which cases train, validate and test, always by patient, and what is measured.

    split: hash = by a keyed hash of the patient, so that added data moves nobody; given = the
        table's split column (train, validation, test) or the format's own parts; shuffled =
        scikit-learn's train_test_split over the case order (to repeat published protocols), which
        private hospitals refuse: one patient moves others from part to part.
    validation, test: shares of the patients. With folds, fold `fold` of `folds` is the test part.
    stratify: shuffled only: keep class shares where every class has more than two cases.
    metrics: what is reported; omitted, the task's own list.
    bootstrap: resamples of patients for the intervals; 0 = none.
    """

    split: Literal["hash", "given", "shuffled"] = "hash"
    validation: Fraction = 0.15
    test: Fraction = 0.2
    folds: Count | None = None
    fold: int = 0
    key: str = "medfl"
    random_state: int = 0
    stratify: bool = False
    metrics: list[str] | None = None
    bootstrap: int = 1000


@written
class Quality:
    """How much unusable data a hospital may have and still take part.

    max_quarantined: share of the cases. Above it, the hospital is asked to look first.
    min_cases: usable cases that a hospital needs at least.
    """

    max_quarantined: Fraction = 0.1
    min_cases: Count = 2


@written
class SimulatedSite:
    """One hospital made from a public data set; paths start at `--data`."""

    name: Name
    data: DataSource
    privacy_epsilon: Positive | None = None


@written
class Partition:
    """How one public collection becomes several hospitals.

    column: one site a value of this column of the table; sites of fewer cases than `drop_below`
        are left out, then those below `merge_below` are joined into the site `rest`. iid:
        equal random parts. label_skew: Dirichlet(alpha) over the classes (Hsu et al. 2019).
        quantity_skew: Dirichlet(alpha) over the sizes. size: by image volume in voxels, smallest
        first, equal counts.
    """

    kind: Literal["column", "iid", "label_skew", "quantity_skew", "size"]
    sites: Count | None = None
    column: str | None = None
    alpha: Positive = 0.5
    drop_below: int = 0
    merge_below: int = 0
    seed: int = 0


@written
class Simulation:
    """How `medfl-simulate --data DIR` finds the hospitals; hospitals themselves ignore it.

    Either `sites`, or `data` with `partition`; without this table, every folder below DIR that
    holds a site.toml is a hospital.
    """

    sites: list[SimulatedSite] | None = None
    data: DataSource | None = None
    partition: Partition | None = None


@written
class Study:
    """The agreement: what is computed, from what, how, and under which privacy."""

    name: Name
    task: Task
    model: Model
    training: Training
    federation: Federation
    title: str = ""
    purpose: str = ""
    image: ImageInput | None = None
    record: RecordInput | None = None
    privacy: Privacy | None = None
    secure_aggregation: SecureAggregation | None = None
    site_privacy: SiteLevelPrivacy | None = None
    evaluation: Evaluation = Evaluation()
    quality: Quality = Quality()
    simulation: Simulation | None = None

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the canonical form: every key with its default, sorted, as compact JSON.

        Comments, order and spelling of numbers in the file do not matter; every value does.
        """
        plain = asdict(self)
        # The start weights are named by their content; where they lie is each machine's own affair.
        plain["model"].pop("start_weights")
        if self.federation.patience is None:  # was added later: studies without it stay the same
            plain["federation"].pop("patience")
        text = json.dumps(_one_spelling(plain), sort_keys=True, separators=(",", ":"), default=str)
        return hashlib.sha256(text.encode()).hexdigest()

    def with_strategy(self, strategy: str) -> Study:
        """The same study under another strategy with that strategy's default options.

        In the open: it is for comparisons on one machine, and some strategies compare updates.
        """
        if strategy == self.federation.strategy:
            return self
        return replace(
            self,
            federation=replace(self.federation, strategy=strategy, options=None),
            secure_aggregation=None,
        )

    def faults(self) -> list[str]:
        """Contradictions between keys, one line each."""
        return [line for group in _CHECKS for line in group(self)]


def _one_spelling(value: Any) -> Any:
    """The same plain value with whole floats as integers: in an option, 1.0 says what 1 says."""
    if isinstance(value, dict):
        return {key: _one_spelling(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_one_spelling(inner) for inner in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def load_study(path: Path) -> Study:
    """Read study.toml; relative paths in it start at its folder. Raises ConfigError."""
    study = config.load(path, Study)
    if study.model.start_weights is not None:
        place = path.resolve().parent / study.model.start_weights
        study = replace(study, model=replace(study.model, start_weights=place))
    return study


def _task_faults(study: Study) -> list[str]:
    task, faults = study.task, []
    if len(task.classes) < 2 and not task.multi_label:
        faults.append("task.classes: has fewer than two names; name every class")
    if len(set(task.classes)) != len(task.classes):
        faults.append("task.classes: names a class twice; give each its own name")
    if task.kind == "risk" and len(task.classes) != 2:
        faults.append('task.classes: a risk has two outcomes; write ["no event", "event"]')
    for value, name in (task.label_map or {}).items():
        if name not in task.classes:
            faults.append(
                f"task.label_map.{value}: {name!r} is not in task.classes; "
                f"use one of {task.classes}"
            )
    if task.multi_label and task.kind != "classification":
        faults.append("task.multi_label: only a classification has it; remove the key")
    return faults


def _input_faults(study: Study) -> list[str]:
    faults = []
    if (study.image is None) == (study.record is None):
        faults.append("image, record: a study has exactly one of these tables; keep one")
    if study.task.kind == "segmentation" and study.record is not None:
        faults.append("record: a segmentation needs images; write an [image] table")
    image = study.image
    if image is not None:
        if len(image.size) != image.dimensions:
            faults.append(
                f"image.size: has {len(image.size)} numbers for {image.dimensions} dimensions; "
                f"write {image.dimensions}"
            )
        if image.spacing_mm is not None and len(image.spacing_mm) != image.dimensions:
            faults.append(f"image.spacing_mm: write {image.dimensions} numbers, one an axis")
        if image.intensity == "range" and image.window is None:
            faults.append('image.window: is missing; intensity = "range" needs [low, high]')
        if image.window is not None and image.window[0] >= image.window[1]:
            faults.append("image.window: low must be below high; write [low, high]")
        letters = {"L": "x", "R": "x", "A": "y", "P": "y", "S": "z", "I": "z"}
        if sorted(letters.get(c, "?") for c in image.orientation) != ["x", "y", "z"]:
            faults.append('image.orientation: write one of each pair R/L, A/P, S/I, such as "RAS"')
        if image.fit == "keep" and study.task.kind != "segmentation":
            faults.append('image.fit: "keep" serves segmentation only; use pad_crop or resize')
    if study.record is not None:
        names = [f.name for f in study.record.features]
        if not names:
            faults.append("record.features: is empty; name at least one feature")
        if len(set(names)) != len(names):
            faults.append("record.features: names a feature twice; remove one")
        for number, feature in enumerate(study.record.features):
            faults += _feature_faults(number, feature, study.record)
    return faults


def _feature_faults(number: int, feature: Feature, record: RecordInput) -> list[str]:
    faults: list[str] = []
    if feature.range is not None and feature.range[0] >= feature.range[1]:
        faults.append(f"record.features.{number}.range: low must be below high")
    if feature.scale_range is not None and feature.scale_range[0] >= feature.scale_range[1]:
        faults.append(f"record.features.{number}.scale_range: low must be below high")
    if record.scale == "range" and feature.kind == "number" and feature.ends is None:
        faults.append(
            f'record.features.{number}.range: is missing; scale = "range" needs [low, high] for '
            f"{feature.name}"
        )
    codes = [level(code) for code in feature.levels or ()]
    if len(set(codes)) != len(codes):
        faults.append(
            f'record.features.{number}.levels: names a level twice ("1.0" is the same code as '
            '"1"); remove one'
        )
    return faults


def _training_faults(study: Study) -> list[str]:
    training, faults = study.training, []
    if (study.model.start_weights is None) != (study.model.start_weights_sha256 is None):
        faults.append("model.start_weights, model.start_weights_sha256: go together; write both")
    if (training.local_steps is None) == (training.local_epochs is None):
        faults.append("training.local_steps, training.local_epochs: write exactly one of the two")
    if training.loss in ("dice", "dice_ce") and study.task.kind != "segmentation":
        faults.append(f'training.loss: "{training.loss}" compares masks; use "cross_entropy"')
    outputs = len(study.task.classes)
    if training.class_weights is not None and len(training.class_weights) != outputs:
        faults.append(f"training.class_weights: write {outputs} numbers, one a class")
    if training.warmup_rounds < 0 or training.warmup_rounds >= study.federation.rounds:
        if training.warmup_rounds != 0:
            faults.append("training.warmup_rounds: must be at least 0 and below federation.rounds")
    return faults


def _federation_faults(study: Study) -> list[str]:
    federation, faults = study.federation, []
    if federation.keep == "best" and federation.best_metric is None:
        faults.append('federation.best_metric: is missing; keep = "best" needs the metric to go by')
    if federation.keep == "best" and not study.evaluation.validation:
        if study.evaluation.split != "given":
            faults.append(
                'evaluation.validation: is 0, and keep = "best" chooses by validation cases; give '
                'them a share, or write keep = "last"'
            )
    faults += _patience_faults(study)
    if federation.sites_per_round is not None and federation.sites_per_round < federation.min_sites:
        faults.append("federation.sites_per_round: must be at least federation.min_sites")
    return faults


def _patience_faults(study: Study) -> list[str]:
    federation, key = study.federation, "federation.patience"
    if federation.patience is None:
        return []
    faults = []
    if federation.best_metric is None:
        faults.append(f"{key}: needs federation.best_metric, the metric that it goes by")
    if not study.evaluation.validation and study.evaluation.split != "given":
        faults.append(
            f"{key}: evaluation.validation is 0, and the rule goes by validation cases; give them "
            "a share, or remove it"
        )
    if federation.keep == "average":
        faults.append(
            f'{key}: keep = "average" is the mean of the second half of all rounds, which an early '
            'end cuts off; write keep = "best", or remove it'
        )
    if federation.patience >= federation.rounds:
        faults.append(f"{key}: must be below federation.rounds, else it never ends anything")
    return faults


# Metrics that sums over patients with noise can give. The others need all cases in order.
RELEASABLE = {
    "segmentation": ("dice",),
    "classification": ("accuracy", "balanced_accuracy", "recall", "specificity"),
    "risk": ("accuracy", "balanced_accuracy", "recall", "specificity"),
}


def _privacy_faults(study: Study) -> list[str]:
    privacy, federation, faults = study.privacy, study.federation, []
    if privacy is None:
        return []
    if privacy.delta >= 1:
        faults.append("privacy.delta: must be below 1; use less than 1 / number of patients")
    if federation.best_metric is not None:
        fitting = RELEASABLE[study.task.kind]
        if privacy.metrics_epsilon is None:
            faults.append(
                "federation.best_metric: no private hospital reports metrics; remove it and write "
                'keep = "last", or state what metrics may cost as privacy.metrics_epsilon'
            )
        elif not federation.best_metric.startswith(fitting):
            faults.append(
                "federation.best_metric: cannot be released with noise; use one of "
                f"{', '.join(fitting)}"
            )
    if privacy.metrics_epsilon is not None and study.task.multi_label:
        faults.append("privacy.metrics_epsilon: is not for multi_label tasks yet; remove it")
    return faults + [
        f"privacy: {key}; without that it is computed from the records with no noise, and each "
        "private hospital refuses"
        for key in unprotected_anywhere(study)
    ]


def _secure_faults(study: Study) -> list[str]:
    if study.secure_aggregation is None:
        return []
    faults = []
    if study.federation.min_sites < 2:
        faults.append(
            "federation.min_sites: must be at least 2 with [secure_aggregation], and better 3: the "
            "sum of one update is that update, and one of two hospitals can subtract its own"
        )
    if study.site_privacy is not None:
        faults.append(
            "secure_aggregation: does not go with [site_privacy] yet, whose bound on each update "
            "the coordinator keeps; remove one of the two tables, or use [privacy]"
        )
    priced = study.privacy is not None and study.privacy.metrics_epsilon is not None
    if study.federation.best_metric is not None and not priced:
        faults.append(
            "federation.best_metric: no hospital tells its own metrics with [secure_aggregation]; "
            'remove it and write keep = "last" or "average", or state what noised metrics may cost '
            "as privacy.metrics_epsilon"
        )
    return faults


def unprotected(study: Study) -> list[str]:
    """What all hospitals compute from their records without noise, and get to know; with remedies.

    It reaches everybody who gets the model, because the model's input is made with it.
    """
    found = []
    record, image = study.record, study.image
    if record is not None:
        if record.scale == "federated":
            found.append('record.scale (write "range", with a range for each number)')
        if any(f.kind == "category" and f.levels is None for f in record.features):
            found.append("record.features (write the levels of each category)")
    if image is not None and image.intensity == "federated":
        found.append('image.intensity (write "zscore", "percentiles" or "range")')
    if study.training.loss == "weighted_cross_entropy" and study.training.class_weights is None:
        found.append("training.class_weights (write them)")
    return found


def unprotected_anywhere(study: Study) -> list[str]:
    """`unprotected`, and what a hospital computes for itself alone: its updates show that too."""
    found = []
    if study.record is not None and study.record.scale == "site":
        found.append('record.scale (write "range", with a range for each number)')
    # A patient more shuffles all others anew: some go from the test part into training.
    if study.evaluation.split == "shuffled" and study.evaluation.folds is None:
        found.append(
            'evaluation.split (write "hash", by which no patient moves another, or "given")'
        )
    return found + unprotected(study)


def _site_privacy_faults(study: Study) -> list[str]:
    privacy, federation, faults = study.site_privacy, study.federation, []
    if privacy is None:
        return []
    if privacy.delta * privacy.sites >= 1:
        faults.append("site_privacy.delta: must be below 1 / sites")
    if federation.weighting != "equal":
        faults.append(
            'federation.weighting: write "equal"; with [site_privacy] every update has one bound, '
            "which a weight would change"
        )
    if federation.sites_per_round is not None:
        faults.append(
            "federation.sites_per_round: remove it; with [site_privacy] every hospital is asked "
            "in every round, and the noise is for that"
        )
    if federation.min_sites > privacy.sites:
        faults.append("site_privacy.sites: must be at least federation.min_sites")
    if federation.best_metric is not None:
        faults.append(
            'federation.best_metric: remove it and write keep = "last"; a choice by metrics is '
            "an answer about the hospitals that [site_privacy] has no noise for"
        )
    if (study.model.options or {}).get("norm") == "batch":
        faults.append(
            "model.options.norm: batch norm's variances cannot carry the noise of [site_privacy]; "
            'use "group" or "instance"'
        )
    return faults + [
        f"site_privacy: {key}; without that it is computed from all hospitals with no noise"
        for key in unprotected(study)
    ]


def _evaluation_faults(study: Study) -> list[str]:
    evaluation, faults = study.evaluation, []
    if evaluation.validation + evaluation.test >= 1:
        faults.append("evaluation.validation, evaluation.test: leave no patients for training")
    if evaluation.folds is not None and not 0 <= evaluation.fold < evaluation.folds:
        faults.append("evaluation.fold: must be from 0 to evaluation.folds - 1")
    if evaluation.folds == 1:
        faults.append("evaluation.folds: one fold leaves nothing to train on; use 2 or more")
    if evaluation.bootstrap < 0:
        faults.append("evaluation.bootstrap: must be at least 0")
    return faults


def _simulation_faults(study: Study) -> list[str]:
    simulation = study.simulation
    if simulation is None:
        return []
    faults = []
    if (simulation.sites is None) == (simulation.data is None):
        faults.append("simulation.sites, simulation.data: write exactly one of the two")
    if (simulation.data is None) != (simulation.partition is None):
        faults.append("simulation.data, simulation.partition: go together; write both or none")
    names = [s.name for s in simulation.sites or []]
    if len(set(names)) != len(names):
        faults.append("simulation.sites: names a site twice; give each its own name")
    partition = simulation.partition
    if partition is not None:
        if partition.kind == "column" and partition.column is None:
            faults.append("simulation.partition.column: is missing; name the table's column")
        if partition.kind != "column" and partition.sites is None:
            faults.append("simulation.partition.sites: is missing; say how many sites")
    return faults


_CHECKS = (
    _task_faults,
    _input_faults,
    _training_faults,
    _federation_faults,
    _privacy_faults,
    _secure_faults,
    _site_privacy_faults,
    _evaluation_faults,
    _simulation_faults,
)
