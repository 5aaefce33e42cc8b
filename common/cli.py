"""What all commands share: errors become one message and a documented exit code."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import click
import typer
from typer.core import TyperArgument
from typer.utils import get_params_from_function

from medfl import __version__
from medfl.common.errors import Interrupted, MedflError

EXIT_CODES = (
    "Exit codes: 0 done; 1 failed; 2 a file or option is wrong; 3 the data cannot serve the study; "
    "4 privacy budget spent; 5 refused by policy; 6 too few sites answered; 7 disk full or a "
    "damaged file; 8 stopped by a person."
)


def _say_version(value: bool) -> None:
    if value:
        typer.echo(f"medfl {__version__}")
        raise typer.Exit


Version = Annotated[
    bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Say which.")
]


def new_app() -> typer.Typer:
    """A command with sub-commands, as all of medfl's look and behave."""
    return typer.Typer(
        no_args_is_help=True,
        add_completion=False,
        context_settings={"help_option_names": ["-h", "--help"]},
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        epilog=EXIT_CODES,
    )


def run(
    app: typer.Typer,
    argv: Sequence[str] | None,
    name: str,
    defaults: Callable[[click.Command], Mapping[str, Any]] = lambda command: {},
) -> int:
    """Run `app` and return the exit code; only here are errors turned into text.

    defaults: what a settings file says, as click's default_map.
    """
    try:
        command = _mended(typer.main.get_command(app))
        code = command.main(
            args=None if argv is None else list(argv),
            prog_name=name,
            standalone_mode=False,
            default_map=dict(defaults(command)),
        )
        return int(code or 0)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        print("Stopped.", file=sys.stderr)
        return Interrupted.exit_code
    except MedflError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return error.exit_code


class _Formatter(click.HelpFormatter):
    """Arguments once, and without typer's backslashes, which are for rich and not used here."""

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        start = len(self.buffer)
        with super().section(name):
            yield
        if name == "Positional arguments":  # click's; typer's come after them
            del self.buffer[start:]

    def write_dl(self, rows: Iterable[tuple[str, str]], *args: Any, **more: Any) -> None:
        super().write_dl([(name, text.replace("\\[", "[")) for name, text in rows], *args, **more)


class _Context(click.Context):
    formatter_class = _Formatter


def _mended(command: click.Command) -> click.Command:
    """The command with the help of its arguments, which click 8.5 takes from typer 0.20's."""
    command.context_class = _Context
    callback = getattr(command.callback, "__wrapped__", None)
    known = {} if callback is None else get_params_from_function(callback)
    for argument in command.params:
        if isinstance(argument, TyperArgument) and argument.name in known:
            argument.help = known[argument.name].default.help
    for inner in getattr(command, "commands", {}).values():
        _mended(inner)
    return command


def log_to_stderr(verbose: bool) -> None:
    """Warnings to stderr; with `verbose` also what happens meanwhile."""
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING,
        format="%(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    # Flower's own loggers are set to tell everything as soon as it is imported.
    for handler in logging.getLogger().handlers:
        handler.setLevel(logging.INFO if verbose else logging.WARNING)
    for noisy in ("flwr", "httpx", "matplotlib", "PIL"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
