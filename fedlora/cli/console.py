"""Common code of all commands: their consoles, and errors as one line and an exit code."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import typer
from click.exceptions import Abort, ClickException, NoArgsIsHelpError
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

from fedlora.core.files import user_path
from fedlora.errors import ConfigError, FedLoraError, system_errors_in_words

# Paths, labels and values are printed letter for letter: nothing is read as markup, `marked` has the styles.
AS_IT_IS: dict[str, Any] = {"soft_wrap": True, "markup": False, "emoji": False, "highlight": False}
out = Console(width=None if sys.stdout.isatty() else 160, **AS_IT_IS)
err = Console(stderr=True, **AS_IT_IS)

FOLDED = 20
"""Columns of the terminal that a folded column has at least."""

Command = TypeVar("Command", bound=Callable[..., None])


class Commands(TyperGroup):
    """The command with its subcommands; what is wrong with a command line is one line, too."""

    def main(self, *args: Any, **options: Any) -> Any:
        try:
            code = super().main(*args, **options | {"standalone_mode": False})
        except NoArgsIsHelpError as error:
            error.show()
            sys.exit(error.exit_code)
        except ClickException as error:
            context = getattr(error, "ctx", None)
            where = f" ({context.command_path} --help)" if context else ""
            _say_error(error.format_message().rstrip(".") + where)
            sys.exit(error.exit_code)
        except Abort:
            err.print("aborted")
            sys.exit(1)
        if options.get("standalone_mode", True):
            sys.exit(code or 0)
        return code


def table_of(
    header: Sequence[str], rows: Sequence[Sequence[str]], *, left: Collection[str] = (), folded: str = "",
    room: int | None = None,
) -> Table:  # fmt: skip
    """A table in which nothing is cut: a terminal that is too narrow breaks its lines.

    Args:
        header: of each column.
        rows: a text for each column.
        left: headings of columns that hold words; the others hold numbers.
        folded: the heading of the column that is broken first, into lines of its own.
        room: columns of the terminal; by default those of standard output.
    """
    table, least = Table(box=None, header_style="bold", pad_edge=False), 0
    for place, heading in enumerate(header):
        width = max(cell_len(cells[place]) for cells in (header, *rows))
        width = min(width, FOLDED) if heading == folded else width
        least += width + 1 + bool(place)  # rich's padding
        table.add_column(
            Text(heading), no_wrap=heading != folded, overflow="fold", min_width=width,
            justify="left" if heading in (*left, folded) else "right",
        )  # fmt: skip
    for cells in rows:
        table.add_row(*map(Text, cells))
    if least > (room or out.width):
        table.width = least  # else rich leaves out what does not fit
    return table


def marked(beginning: str, rest: str = "", style: str = "bold") -> Text:
    """A line whose beginning is in a style."""
    return Text.assemble((beginning, style), rest)


def write_line(text: str) -> None:
    """Write a line letter for letter, with the tabs and control characters that rich leaves out."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _say_error(text: str) -> None:
    err.print(marked("error:", f" {' '.join(text.split())}", "red"))


def one_line_errors(command: Command) -> Command:
    """Turn fedlora's errors into one line on standard error and the exit code that belongs to them.

    The operating system's are among them, see `fedlora.errors.of_the_system`.
    """

    @wraps(command)
    def guarded(*args: Any, **kwargs: Any) -> None:
        _begin(command.__name__)
        try:
            with system_errors_in_words():
                command(*map(_at_home, args), **{name: _at_home(value) for name, value in kwargs.items()})
        except FedLoraError as error:
            _say_error(str(error))
            sys.exit(2 if isinstance(error, ConfigError) else 1)
        except KeyboardInterrupt:
            goes_on = ", go on with --resume" if "resume" in kwargs else ""
            err.print(f"interrupted; what was written stays{goes_on}")
            sys.exit(1)

    return guarded  # type: ignore[return-value]


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Inside, SIGTERM ends a command as Ctrl-C does: what it started is stopped, what it holds is let go."""
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def interrupt(number: int, _: Any) -> None:
    """A signal's handler: the first one interrupts, others are ignored while things are put in order.

    `timeout` sends SIGTERM to a process and then to its group, and so does many a service manager.
    """
    signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def print_version(wanted: bool) -> None:
    """The version and nothing else."""
    if wanted:
        import fedlora

        out.print(f"fedlora {fedlora.__version__}")
        raise typer.Exit


def _begin(command: str) -> None:
    """Say at once that the command has begun, to a person who waits: the imports that follow take seconds."""
    if err.is_terminal:
        err.print(f"{command.replace('_', ' ')} ...", style="dim")


def _at_home(value: Any) -> Any:
    """An argument with ``~`` in its paths written out, which a shell leaves in quotes and after ``=``."""
    if isinstance(value, list):
        return [_at_home(each) for each in value]
    return user_path(value) if isinstance(value, Path) else value


def percent(value: float | None) -> str:
    """An accuracy for people."""
    return "not measured" if value is None else f"{100 * value:.1f} %"
