"""Arrays that stay at the hospital from round to round: one file a round.

A round may be asked again, because the coordinator died before it kept the answers. Then the site
starts from what it had before that round, and sends the same again.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from medfl.common import tensors
from medfl.common.tensors import Array, Tensors


@dataclass(frozen=True, slots=True)
class ByRound:
    """One kind of arrays in `folder`, such as the layers that stay at home."""

    folder: Path
    kind: str

    def as_of(self, round_: int) -> dict[str, Array]:
        """The arrays as of the end of `round_`; none before this site's first training.

        A site that was not drawn in that round has them from the last one before in which it was.
        """
        file = self._newest(round_)
        return {} if file is None else tensors.load(file)

    def save(self, round_: int, arrays: Tensors, also: int = 0) -> None:
        """Keep them as of the end of `round_`; of the others those before it and as of `also`."""
        wanted = {self._newest(round_ - 1), self._newest(also)}
        for file in self._files():
            if file not in wanted:
                file.unlink()
        tensors.save(arrays, self._file(round_))

    def _newest(self, round_: int) -> Path | None:
        return max((f for f in self._files() if f <= self._file(round_)), default=None)

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob(f"{self.kind}_*.safetensors"))

    def _file(self, round_: int) -> Path:
        return self.folder / f"{self.kind}_{round_:05d}.safetensors"
