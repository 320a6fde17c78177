"""Numbers that no option takes."""

from __future__ import annotations

from typing import Any

import pytest
import typer.main
from typer.testing import CliRunner

from lfm2vl_edge.cli import COMMANDS, build
from tests.cli.test_terminal import REQUIRED


def float_options() -> list[tuple[str, str]]:
    """Return each option of each command that takes a number with a fraction."""
    found: list[tuple[str, str]] = []
    for name in COMMANDS:
        command: Any = typer.main.get_command(build([name]))
        parameters = getattr(command, "commands", {name: command})[name].params
        found += [(name, one.opts[-1]) for one in parameters if one.type.name in ("float", "float range")]
    return found


@pytest.mark.parametrize(("name", "option"), float_options())
def test_numbers_that_are_not_finite_are_wrong_usage(name: str, option: str) -> None:
    for number in ("nan", "inf", "-inf", "1e999"):
        done = CliRunner().invoke(build([name]), [name, *REQUIRED.get(name, ("x",)), option, number])
        assert done.exit_code == 2, done.output
        assert isinstance(done.exception, SystemExit)
        assert option in done.output


def test_most_commands_take_such_numbers() -> None:
    assert {name for name, _ in float_options()} >= {"run", "plan", "verify", "convert", "eval", "choose", "serve"}
