"""python -m medfl.simulations.attacks NAME --out DIR: one attack, in numbers and as a figure."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from medfl.common import cli, tensors
from medfl.common.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

app = cli.new_app()
ATTACKS = ("inversion", "membership", "poisoning")
_SIZES = {"inversion": (9.0, 2.1), "membership": (4.6, 4.4), "poisoning": (6.4, 3.6)}


@app.command()
def attack(
    name: Annotated[str, typer.Argument(help=f"One of {', '.join(ATTACKS)}.")],
    out: Annotated[Path, typer.Option(help="Folder for NAME.svg and NAME.json.")] = Path("attacks"),
    seed: Annotated[int, typer.Option(help="Same seed, same result.")] = 0,
) -> None:
    """Attack our own training with and without protection, and draw what was found.

    Example: python -m medfl.simulations.attacks inversion --out attacks
    """
    from medfl.server.report.plot import save

    if name not in ATTACKS:
        raise ConfigError(f"{name}: is no attack; use one of {', '.join(ATTACKS)}")
    numbers, draw = _run(name, seed)
    save(out / f"{name}.svg", _SIZES[name], draw)
    text = json.dumps({"attack": name, "seed": seed, "found": numbers}, indent=2) + "\n"
    tensors.write_atomic(out / f"{name}.json", text.encode())
    typer.echo(text, nl=False)


def _run(name: str, seed: int) -> tuple[Any, Callable[[Figure], None]]:
    """The numbers of an attack, and how to draw it."""
    from medfl.simulations.attacks import inversion, membership, poisoning
    from medfl.simulations.run import single_thread

    single_thread()
    if name == "inversion":
        inverted = inversion.run(seed)
        return inverted.found, lambda figure: inversion.draw(inverted, figure)
    if name == "membership":
        told = membership.run(seed)
        areas = {what: {"auc": t.auc, "interval": t.interval} for what, t in told.items()}
        return areas, lambda figure: membership.draw(told, figure)
    accuracies = poisoning.run(seed)
    numbers = {what: {"honest": a, "poisoned": b} for what, (a, b) in accuracies.items()}
    return numbers, lambda figure: poisoning.draw(accuracies, figure)


if __name__ == "__main__":
    raise SystemExit(cli.run(app, None, "python -m medfl.simulations.attacks"))
