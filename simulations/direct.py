"""Hospitals of this process, asked one after another: for many short runs of one study, where a
pool of workers would take longer to start than to train. The same bits as with a pool."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from medfl.client.hospital import Hospital, answer
from medfl.common.errors import MedflError
from medfl.common.messages import Instruction, Reply, refusal
from medfl.simulations.sites import SimulatedRun

Change = Callable[[Instruction, Reply], Reply]


class Direct:
    """What a coordinator asks (`medfl.server.roster.Sites`); `change` may spoil a reply."""

    def __init__(
        self, hospitals: Sequence[Hospital], change: Change = lambda asked, reply: reply
    ) -> None:
        self._hospitals = {h.name: h for h in hospitals}
        self._change = change

    @classmethod
    def of(cls, run: SimulatedRun) -> Direct:
        """All hospitals of a run."""
        return cls([run.hospital(node) for node in range(1, len(run.names) + 1)])

    def names(self) -> list[str]:
        """Their addresses, which are their names."""
        return list(self._hospitals)

    def ask(self, instructions: Iterable[tuple[str, Instruction]]) -> Iterator[Reply]:
        """Replies in the order asked."""
        for name, asked in instructions:
            try:
                reply = answer(self._hospitals[name], asked)
            except MedflError as error:
                reply = refusal(name, error, asked.round)
            yield self._change(asked, reply)
