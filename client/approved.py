"""The training process's only way to a hospital: through its approvals, asked at every message."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from medfl.client import consent, witness
from medfl.client.book import Book
from medfl.client.consent import Refusal, allowed
from medfl.client.data.lineage import Used, lineage_path, record_round
from medfl.client.hospital import Hospital
from medfl.client.premises import Home
from medfl.client.reading import Watch
from medfl.client.secure_site import Identity
from medfl.common.denials import Denials
from medfl.common.errors import NotApproved, PolicyRefused
from medfl.common.messages import Envelope, Instruction
from medfl.common.private_files import (
    private_folder,
    refuse_full,
    refuse_writable,
)
from medfl.common.receipts import Seal, asked_by, attach, content_of, seal
from medfl.common.signing import public_of
from medfl.common.site import Site, load_site
from medfl.common.study import Study


class InContext(Protocol):
    """What is needed of Flower's Context."""

    run_config: Any


@dataclass(frozen=True, slots=True)
class Found:
    """A study's hospital, with the site.toml and the state of the data that it was made from."""

    study: str
    site: Site
    hospital: Hospital
    data: Watch


@dataclass(slots=True)
class Approved:
    """Finds the hospital that may answer for a study, and seals what it answers.

    Between messages it keeps the cohort of the last study, which is read once and again when the
    data have changed. site.toml is read at every message: what it says now holds, or nothing runs.
    """

    home: Home
    site_file: Path
    name: str
    denials: Denials = field(default_factory=Denials)
    _last: Found | None = field(default=None)

    def __call__(self, context: InContext) -> Hospital:
        """The hospital, if the study is approved now.

        Raises:
            PolicyRefused: it is not, or the cases or site.toml are others than those that were
                approved, or the privacy ledger was put back.
            ConfigError: site.toml cannot be read as it is now.
            StorageError: what is done could not be written down.
        """
        refuse_full(self.home.folder)
        digest = str(context.run_config["study"])
        self._refuse(digest, None, None)
        refuse_writable(self.site_file)
        site = load_site(self.site_file)
        self._refuse(digest, None, site)
        site = consent.for_study(self.home, digest, site)
        hospital = self._kept(digest, site)
        if hospital is None:
            self._last = None
            # Looked at before they are read: what changes meanwhile is noticed at the next message.
            data = Watch(site, (self.home.folder,))
            hospital = self._hospital(site, consent.by_digest(self.home, digest))
            self._refuse(digest, hospital.cohort.digest, site)
            self._last = Found(digest, site, hospital, data)
        witness.refuse_other_ledger(self.home, hospital.ledger)
        return hospital

    def note_refusal(self, asked: Instruction, why: str) -> None:
        """Write down what was asked and not answered; `medfl-client status` shows it.

        Raises:
            StorageError: it could not be written down.
        """
        consent.note_refusal(self.home, self.denials, asked, why)

    def seal(self, about: str, asked: Instruction, envelope: Envelope) -> Envelope:
        """The answer with this site's signature. about: JSON part of the instruction as it came.

        An update is in the lineage when this returns.

        Raises:
            StorageError: it could not be written down, and stays here.
        """
        if asked.kind == "round" and envelope.arrays.get("delta"):
            self._note_lineage(asked)
        if self._last is not None:
            witness.know_ledger(self.home, self._last.hospital.ledger)
        bare = Seal(
            study=asked.study_digest,
            run=asked.run,
            kind=asked.kind,
            asked=asked_by(about),
            round=asked.round,
            attempt=asked.attempt,
            site=self.name,
            content=content_of(envelope),
        )
        sealed = seal(self.home.signing_key(), bare)
        if not json.loads(envelope.about)["refusal"]:  # which `note_refusal` has written down
            self.home.record(
                "answered",
                study=asked.study_digest,
                run=asked.run,
                kind=asked.kind,
                round=asked.round,
                content=sealed.content,
            )
        return attach(envelope, sealed)

    def _note_lineage(self, asked: Instruction) -> None:
        if self._last is None:
            raise PolicyRefused("There is an update and no cohort that it could have come from.")
        cohort, decision = self._last.hospital.cohort, self.home.decision(asked.study_digest)
        # As the approval names it: the coordinator's plan goes by that.
        named = decision.cohort if decision and decision.cohort else cohort.digest
        used = Used(asked.study_digest, asked.run, named, asked.round, asked.model)
        record_round(lineage_path(self._last.site), cohort, used)

    def _kept(self, digest: str, site: Site) -> Hospital | None:
        """The hospital of the last message, if it is for this study, under the same site.toml and
        for the cases approved now, and the data have not changed."""
        last = self._last
        if last is None or last.study != digest or last.site != site:
            return None
        answer = allowed(self.home, digest, last.hospital.cohort.digest, site)
        if isinstance(answer, Refusal) or last.data.has_changed():
            return None
        return last.hospital

    def _refuse(self, digest: str, cohort: str | None, site: Site | None) -> None:
        answer = allowed(self.home, digest, cohort, site)
        if isinstance(answer, Refusal):
            raise NotApproved(f"Nothing is run for this study: {answer.why}.")

    def _hospital(self, site: Site, study: Study) -> Hospital:
        from medfl.client.data.own import own_cohort

        folder = private_folder(self.home.folder / "work" / study.digest[:16])
        return Hospital(
            name=self.name,
            study=study,
            load_cohort=lambda: own_cohort(site, study),
            folder=folder,
            policy=site.policy,
            privacy=site.privacy,
            device=device_of(site, folder),
            ledger_folder=site.ledger,
            sums_file=self.home.folder / "sums-told.jsonl",
            identity=self._identity(study.digest),
            book=Book.at(book_file(self.home, study.digest), study, site.policy.runs_per_approval),
            approval=lambda: consent.number(self.home, study.digest),
            note_unlike=lambda fields: consent.note_unlike(self.home, study.digest, fields),
        )

    def _identity(self, digest: str) -> Identity:
        """Of this site; others' keys are those that are pinned and approved when they are asked
        for: a hospital that the coordinator invented after the approval is nobody."""
        key = self.home.signing_key()

        def key_of(site: str) -> str | None:
            if site == self.name:
                return public_of(key)
            decision, pinned = self.home.decision(digest), self.home.enrolment().sites.get(site)
            return pinned if decision and decision.sites.get(site) == pinned else None

        return Identity(key, key_of)


def hospitals(argument: str) -> Approved:
    """For `medfl.client.trainer`. argument: JSON with `state` and `site`, paths."""
    about = json.loads(argument)
    home = Home(Path(about["state"]))
    return Approved(home, Path(about["site"]), home.enrolment().site)


def book_file(home: Home, digest: str) -> Path:
    """Where the questions of a study are written down."""
    return home.folder / "work" / digest[:16] / "book.jsonl"


def device_of(site: Site, folder: Path) -> str:
    """cpu or cuda. folder: of this study's work, which remembers whether it had a GPU.

    Raises:
        PolicyRefused: the site asks for a GPU that is not there, or the study had one before and
            would go on without it: some hundred times slower, and nobody would know why.
    """
    import torch

    had_one = folder / "gpu"
    if site.device != "cpu" and torch.cuda.is_available():
        had_one.touch(mode=0o600)
        return "cuda"
    if site.device == "cuda":
        raise PolicyRefused("device: site.toml asks for a GPU and none can be used.")
    if site.device == "auto" and had_one.exists():
        raise PolicyRefused(
            "device: this study was trained on a GPU here, and none can be used now. Mend the "
            'driver, or write device = "cpu" in site.toml to go on without it.'
        )
    return "cpu"
