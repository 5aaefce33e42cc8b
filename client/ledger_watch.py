"""Whether this hospital's ledger only grew since it last answered.

A ledger that was deleted or put back from a backup is whole in itself. How far it had come stands
in the audit log, line by line; that log's head is countersigned by the coordinator, so that putting
both back is noticed at the next connection.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from medfl.client.ledger import Head, Ledger
from medfl.client.premises import Home
from medfl.common.errors import StorageError

_WHAT = "ledger"


@dataclass(slots=True)
class LedgerWatch:
    """The last head that the audit log holds, read once."""

    home: Home
    _last: Head | None = field(default=None)

    def refuse_shrunk(self, ledger: Ledger) -> None:
        """Raises StorageError where the ledger is not what it was and more."""
        last = self._known()
        if why := ledger.noticed(last):
            self.home.record("ledger was put back", had=last.lines, has=ledger.head().lines)
            raise StorageError(why)

    def note(self, ledger: Ledger) -> None:
        """Write the head down where it has grown."""
        head = ledger.head()
        if head != self._known():
            self.home.record(_WHAT, lines=head.lines, hash=head.hash)
            self._last = head

    def _known(self) -> Head:
        if self._last is None:
            self._last = Head(0, "")
            for line in self.home.audit.lines():
                if line["what"] == _WHAT:
                    self._last = Head(int(line["about"]["lines"]), str(line["about"]["hash"]))
        return self._last
