"""By which word a private hospital names its cohort to others: one that tells nothing of it.

A cohort's digest is the same as long as nobody comes or goes, and another one afterwards: who
holds two of them knows whether a patient was added, corrected or has withdrawn. The word is an HMAC
of the digest under a secret of the hospital, with the approval's own time in it, so that each
approval of one cohort has another word and none can be told from chance.
"""

from __future__ import annotations

import hmac

from medfl.common.approvals import Decision
from medfl.common.signing import SigningKey


def cohort_word(key: SigningKey, study: str, at: int, digest: str) -> str:
    """64 hexadecimal digits. key: the hospital's. study: digest. at: the approval's."""
    secret = hmac.digest(key.private_bytes_raw(), b"medfl word for a cohort", "sha256")
    return hmac.digest(secret, f"{study}\x1f{at}\x1f{digest}".encode(), "sha256").hex()


def names(key: SigningKey, decision: Decision, digest: str) -> bool:
    """Whether a decision is about the cohort of this digest, by the digest or by its word."""
    word = cohort_word(key, decision.study, decision.at, digest)
    return decision.cohort == digest or hmac.compare_digest(decision.cohort, word)
