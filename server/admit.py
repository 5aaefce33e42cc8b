"""What a hospital's answer must show before it is looked at: its seal, and its approval."""

from __future__ import annotations

from dataclasses import dataclass

from medfl.common.approvals import Decision
from medfl.common.errors import NotAdmitted, PolicyRefused
from medfl.common.messages import Envelope, Instruction, Reply, pack, unpack_reply
from medfl.common.receipts import Seal, Seen, asked_by, check, content_of, detach
from medfl.server import studies
from medfl.server.federation import Federation, SiteRecord


@dataclass(frozen=True, slots=True)
class Door:
    """Checks the answers of one run. study: digest. seen: what has been counted already."""

    federation: Federation
    study: str
    run: str
    seen: Seen

    def opened(self, site: str, asked: Instruction, envelope: Envelope) -> Reply:
        """The reply of `site` (the certificate's name) to `asked`.

        A refusal may come without a seal: it may be the site's runner that speaks for a training
        process that has died, and it gives nobody any weight.

        Raises:
            NotAdmitted: not sealed by the site's pinned key, for another exchange, sent before, or
                not covered by an approval that holds now.
            FederationError: it is not a reply.
        """
        try:
            return self._opened(site, asked, envelope)
        except NotAdmitted:
            raise
        except PolicyRefused as error:
            raise NotAdmitted("its seal was not accepted", str(error)) from None

    def _opened(self, site: str, asked: Instruction, envelope: Envelope) -> Reply:
        bare, sealed = detach(envelope)
        reply = unpack_reply(bare)
        if sealed is None and reply.refusal:
            return reply
        if sealed is None:
            raise PolicyRefused(f"An answer of {site} is not signed.")
        record = self._record(site)
        expected = Seal(
            study=self.study,
            run=self.run,
            kind=asked.kind,
            asked=asked_by(pack(asked).about),
            round=asked.round,
            attempt=asked.attempt,
            site=site,
            content=content_of(bare),
        )
        check(sealed, expected, record.signing_key)
        if not reply.refusal:
            self._approved(record, reply)
        self.seen.admit(sealed)
        return reply

    def _record(self, site: str) -> SiteRecord:
        record = self.federation.site(site)
        if record is None or record.status != "active":
            raise NotAdmitted("is not an active site", f"{site} is not an active site.")
        return record

    def _approved(self, record: SiteRecord, reply: Reply) -> Decision:
        decision = studies.decision_of(self.federation, self.study, record.name)
        why = studies.refusal(self.federation, record, decision, self.study)
        if why or decision is None:
            raise NotAdmitted("no approval that holds", f"{record.name}: {why or 'no approval'}")
        # A private hospital says "" (its own runner has compared); nobody gains by leaving it out.
        if reply.cohort not in ("", decision.cohort):
            raise NotAdmitted(
                "trained on other cases than approved",
                f"{record.name} trained on other cases than it has approved.",
            )
        if reply.n_cases > decision.cases:
            raise NotAdmitted(
                "claims more cases than approved",
                f"{record.name} claims more training cases than the {decision.cases} approved.",
            )
        return decision
