"""The command line: one file per command, imported only if it is run, so that every start is quick.

Importing this package imports next to nothing: `main` makes Ctrl-C quiet before the first slow import.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # `signal` without its enumerations, which take milliseconds
import os
import sys
from importlib import import_module

TYPE_CHECKING = False  # as in `typing`, which takes milliseconds
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any, Final

    import typer

COMMANDS: Final = (
    "run",
    "chat",
    "caption",
    "choose",
    "detect",
    "point",
    "extract",
    "serve",
    "batch",
    "watch",
    "plan",
    "tune",
    "bench",
    "eval",
    "pull",
    "models",
    "show",
    "rm",
    "convert",
    "calibrate",
    "quantize",
    "verify",
    "doctor",
    "cache",
)
"""In the order of the help. Each has a module of its name, which has a function or an app of the same name."""
_EXIT_INTERRUPTED: Final = 130
_FUNCTIONS: Final = {"eval": "evaluate"}
"""Command -> name of its function, if it differs."""


def build(names: Iterable[str] = COMMANDS) -> typer.Typer:
    """Return the command line with these commands."""
    import typer

    from lfm2vl_edge.cli._options import common

    app = typer.Typer(
        name="lfm2vl-edge",
        help="Ask LFM2-VL vision-language models about images, on this machine.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        add_completion=True,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(common)
    for name in names:
        command = getattr(import_module(f"lfm2vl_edge.cli.{name}"), _FUNCTIONS.get(name, name))
        if isinstance(command, typer.Typer):
            app.add_typer(command)
        else:
            app.command(name)(command)
    return app


def __getattr__(name: str) -> Any:
    if name == "app":
        return build()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def main() -> None:
    """Run the command line; only the command that the first argument names is imported."""
    if _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:  # `command &` in a script ignores Ctrl-C
        _signal.signal(_signal.SIGINT, lambda *_: os._exit(_EXIT_INTERRUPTED))
    from lfm2vl_edge.cli._start import prepare_process

    prepare_process()
    exits_at_once = not (sys.gettrace() or sys.getprofile())  # a tracer or profiler observes the end too
    named = [word for word in sys.argv[1:2] if word in COMMANDS]
    code = _exit_code_of(named or COMMANDS, exits_at_once)
    if exits_at_once:
        _exit_at_once(code)
    sys.exit(code)


def _exit_code_of(names: Iterable[str], exits_at_once: bool) -> Any:
    """Run the command line and return its exit code; commands free nothing if the process exits at once."""
    from lfm2vl_edge.cli._output import EXIT_FAILED, report, report_os_error
    from lfm2vl_edge.errors import EdgeError

    try:
        try:
            build(names)(obj=exits_at_once)
        except SystemExit as end:
            sys.stdout.flush()
            return end.code
    except EdgeError as error:  # llama.cpp does not load when a command is imported; commands report their own
        report(error)
        return EXIT_FAILED
    except OSError as error:  # stdout does not take the help, for example; commands report their own
        report_os_error(error)
        return EXIT_FAILED


def _exit_at_once(code: object) -> None:
    """End the process: the system frees in 10 ms what Python frees, object by object, in 60.

    Return, for an ordinary end, if something would be lost: a thread still works, or output cannot be flushed.
    """
    import threading

    status = 0 if code is None else code
    works = any(not thread.daemon for thread in threading.enumerate() if thread is not threading.main_thread())
    if not isinstance(status, int) or works:
        return
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except (OSError, ValueError):  # it has no reader, or it was closed
        return
    os._exit(status)
