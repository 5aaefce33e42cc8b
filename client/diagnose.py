"""What helps to find a fault from afar: versions, connection, clocks, approvals; no patient data.

Only what is listed here leaves: no logs, no file names, no counts of cases.
"""

from __future__ import annotations

import platform
import shutil
from collections import Counter
from importlib import metadata
from pathlib import Path
from typing import Any

from medfl import __version__
from medfl.client import consent, enrolment, hatch, witness
from medfl.client.coordinator import skew_warning
from medfl.client.machine import existing
from medfl.client.premises import Home
from medfl.common import certificates
from medfl.common.coordination import AskStudies, Studies
from medfl.common.errors import MedflError
from medfl.common.site import load_site

_PACKAGES = ("flwr", "torch", "monai", "opacus", "grpcio", "cryptography", "numpy")


def bundle(home: Home, site_file: Path) -> dict[str, Any]:
    """Plain JSON; a part that fails says so by the kind of its error."""
    return {
        "medfl": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "packages": {name: _version(name) for name in _PACKAGES},
        "free_gb": round(shutil.disk_usage(existing(home.folder)).free / 1e9, 1),
        "enrolment": _tried(lambda: _enrolment(home)),
        "connection": _tried(lambda: _connection(home)),
        "site_file": _tried(lambda: _site(site_file)),
        "studies": _tried(lambda: _studies(home, site_file)),
        "audit": _tried(lambda: _audit(home)),
    }


def _tried(part: Any) -> Any:
    try:
        return part()
    except MedflError as error:
        # The kind only: the text may name folders.
        return {"error": type(error).__name__}


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _enrolment(home: Home) -> dict[str, Any]:
    known = home.enrolment()
    divided = hatch.is_hatch(known.address)
    shown = None if divided else home.identity()[1]
    return {
        "site": known.site,
        "federation": known.federation,
        "address": "the network side" if divided else known.address,
        "authority": enrolment.authority_fingerprint(home),
        "divided": divided,
        "certificate": shown and certificates.digest_of(shown),
        "certificate_days": shown
        and round((certificates.ends_at(shown) - home.clock()) / 86400, 1),
        "pinned_sites": sorted(known.sites),
    }


def _connection(home: Home) -> dict[str, Any]:
    with enrolment.line_to(home) as line:
        answer = line.call("Studies", AskStudies(), Studies)
    clocks = skew_warning(home.clock(), answer.now) or "the clocks agree"
    return {"reached": True, "clocks": clocks}


def _studies(home: Home, site_file: Path) -> dict[str, str]:
    own = load_site(site_file) if site_file.exists() else None
    return {p.digest: consent.verdict(home, p.digest, own) for p in home.published()}


def _site(site_file: Path) -> dict[str, Any]:
    site = load_site(site_file)
    return {
        "format": ", ".join(sorted({source.format for source in site.sources})),
        "device": site.device,
        "own_privacy": site.privacy is not None,
        "tasks": list(site.policy.tasks),
    }


def _audit(home: Home) -> dict[str, Any]:
    checked = witness.check(home)
    bad = None if checked.bad is None else {"line": checked.bad.n, "why": checked.bad.why}
    kinds = Counter(str(line["what"]) for line in home.audit.lines())
    return {"lines": checked.lines, "heads": checked.heads, "bad": bad, "kinds": dict(kinds)}
