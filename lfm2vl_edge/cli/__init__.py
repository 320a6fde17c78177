"""The command line: one file per command, imported when it is asked for, so that every start is a quick one."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterable
from importlib import import_module
from typing import Annotated, Any, Final

import typer

from lfm2vl_edge.cli._output import ENDS_WITH_COMMAND, EXIT_FAILED, report_os_error
from lfm2vl_edge.cli._start import prepare_process

COMMANDS: Final = (
    "run",
    "chat",
    "caption",
    "detect",
    "point",
    "extract",
    "plan",
    "tune",
    "bench",
    "eval",
    "pull",
    "models",
    "rm",
    "convert",
    "calibrate",
    "quantize",
    "verify",
    "doctor",
    "cache",
)
"""In the order of the help. Each has a module of its name, and in it a function, or an app, of the same name."""
_FUNCTIONS: Final = {"eval": "evaluate"}
"""The function's name where it is another one."""


def build(names: Iterable[str] = COMMANDS) -> typer.Typer:
    """Return the command line with these commands."""
    app = typer.Typer(
        name="lfm2vl-edge",
        help="Ask LFM2-VL vision-language models about pictures, on the machine at hand.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        add_completion=True,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_common)
    for name in names:
        found = getattr(import_module(f"lfm2vl_edge.cli.{name}"), _FUNCTIONS.get(name, name))
        if isinstance(found, typer.Typer):
            app.add_typer(found)
        else:
            app.command(name)(found)
    return app


def __getattr__(name: str) -> Any:
    if name == "app":
        return build()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _show_version(wanted: bool) -> None:
    if wanted:
        from lfm2vl_edge import __version__

        typer.echo(f"lfm2vl-edge {__version__}")
        raise typer.Exit


def _common(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line; of the commands, only the one that is named first is imported."""
    prepare_process()
    if not (sys.gettrace() or sys.getprofile()):  # who observes the program wants to see its end too
        ENDS_WITH_COMMAND.set()
    named = [word for word in sys.argv[1:2] if word in COMMANDS]
    code = _exit_code_of(named or COMMANDS)
    _leave(code)
    sys.exit(code)


def _exit_code_of(names: Iterable[str]) -> Any:
    """Run the command line and return what it would exit with."""
    try:
        build(names)()
    except SystemExit as end:
        return end.code
    except OSError as error:  # help that stdout does not take, and the like; commands report theirs
        report_os_error(error)
        return EXIT_FAILED


def _leave(code: object) -> None:
    """End the process at once: the system takes back in 10 ms what Python takes apart, object by object, in 60.

    Return, and let Python end as it always does, where something would be lost: a thread still works, or the last
    words cannot be delivered.
    """
    status = 0 if code is None else code
    works = any(not thread.daemon for thread in threading.enumerate() if thread is not threading.main_thread())
    if not isinstance(status, int) or works or not ENDS_WITH_COMMAND.is_set():
        return
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except (AttributeError, OSError, ValueError):  # there is none, nobody reads it, or it was closed
        return
    os._exit(status)
