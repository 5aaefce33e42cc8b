"""A hospital's word on one study: yes, for these cases and so long; or no more.

Both sides hold the signed word: the hospital to enforce it, the coordinator to prove it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict

from medfl.common.signing import SigningKey, is_signed, sign

_PURPOSE = "decision on a study"


@dataclass(frozen=True, slots=True)
class Decision:
    """verdict: approved, or withdrawn (then cohort, cases and expiry say nothing).

    study, cohort: digests; of a private hospital's cohort a word that only the hospital can make
    (`medfl.client.cohort_word`). cases: training cases of the cohort (under privacy the declared
    number), the most that the site may claim as its weight; 0: it only evaluates. at, expires:
    seconds since 1970. sites: under secure aggregation the signing keys (hex) of the others that it
    may be summed with. signature: by the site's pinned key.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)
    verdict: Literal["approved", "withdrawn"]
    site: str
    study: str
    cohort: str
    cases: int
    at: int
    expires: int
    sites: dict[str, str] = field(default_factory=dict)
    site_toml: str = ""
    signature: str = ""


def signed(key: SigningKey, decision: Decision) -> Decision:
    """The same decision with its signature."""
    bare = replace(decision, signature="")
    return replace(bare, signature=sign(key, _PURPOSE, _signed_part(bare)))


def is_by(public: str, decision: Decision) -> bool:
    """Whether the owner of `public` (hex) signed it."""
    bare = replace(decision, signature="")
    return is_signed(public, _PURPOSE, _signed_part(bare), decision.signature)


def _signed_part(bare: Decision) -> dict[str, Any]:
    """An approval that names no site.toml has the signature that it had before there was one."""
    return {k: v for k, v in asdict(bare).items() if k != "site_toml" or v}


def why_not(
    decision: Decision | None, public: str, site: str, study: str, cohort: str | None, now: float
) -> str:
    """Why this decision does not allow training now, "" where it does.

    cohort: digest of the cases at hand; None where they are not known (the coordinator's side).
    """
    if decision is None:
        return "the study is not approved here"
    if not is_by(public, decision):
        return "the approval is not signed by this site's key: it was changed"
    if decision.site != site:
        return "the approval is another site's"
    if decision.study != study:
        return "the approval is for another study"
    if decision.verdict == "withdrawn":
        return "the approval was withdrawn"
    if cohort is not None and decision.cohort != cohort:
        return "the data have changed since the approval"
    if now >= decision.expires:
        return "the approval has expired"
    if now < decision.at - 3600:
        return "the approval is from the future: compare the clocks"
    return ""
