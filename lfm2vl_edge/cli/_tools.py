"""Tools on the command line: their definitions from a file, and the calls that the model writes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from lfm2vl_edge.cli import _options as opt
from lfm2vl_edge.cli._output import write_line, write_out
from lfm2vl_edge.errors import ConfigError, clip, shorten

if TYPE_CHECKING:
    from lfm2vl_edge.generate import Turn


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolOptions:
    """What the model may call, and whether it must."""

    tools: Annotated[
        str | None,
        opt.answer_option(
            "--tools", metavar="FILE|-", help="Tools that the model may call: OpenAI definitions, JSON."
        ),
    ] = None
    tool_choice: Annotated[
        str | None,
        opt.answer_option(
            "--tool-choice",
            parser=opt.as_text,
            metavar="auto|none|required|NAME",
            help="Whether it calls tools, or which one. Default: auto.",
        ),
    ] = None

    def values(self) -> dict[str, Any]:
        """Return them as keywords of `Model.chat`; the file is read and checked.

        Raises:
            ConfigError: the file cannot be read, or is not JSON; or there is a choice, but no file.
            PromptError: it does not hold definitions of tools.
        """
        if self.tools is None:
            if self.tool_choice not in (None, "none"):
                raise ConfigError(
                    f"--tool-choice {clip(self.tool_choice or '')} needs tools; give them with --tools FILE"
                )
            return {}
        from lfm2vl_edge.prompt.tools import as_tools

        tools = read_tools(self.tools)
        names = [tool.name for tool in as_tools(tools)]
        choice = self.tool_choice or "auto"
        if choice not in ("auto", "none", "required", *names):
            raise ConfigError(
                f"--tool-choice is {shorten(choice)}, but the tools are {clip(', '.join(names))}; name one"
            )
        return {"tools": tools, "tool_choice": choice}


def read_tools(argument: str) -> list[Any]:
    """Return the definitions in a file: a list of them, only one, or an object with `tools`, as in a request.

    Raises:
        ConfigError: it cannot be read, or is not JSON of that form.
    """
    text = opt.read_text(argument, "tools file")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"the tools file {clip(argument)} is not valid JSON: {clip(str(error))}; correct it"
        ) from error
    if isinstance(found, dict):
        found = found.get("tools", [found])
    if not isinstance(found, list) or not found:
        raise ConfigError(
            f"the tools file {clip(argument)} must be a list of definitions, "
            'such as [{"name": "now", "description": "The time."}]'
        )
    return found


def write_calls(turn: Turn) -> None:
    """Write the calls of a turn to stdout, one on a line, and what is not a valid call to stderr."""
    from lfm2vl_edge.prompt.call_text import write_call

    for call in turn.tool_calls:
        write_out(write_call(call.name, call.arguments))
    for one in turn.invalid_tool_calls:
        write_line(f"note: an invalid call is left out: {shorten(one.text)}: {clip(one.reason)}")


def calls_as_json(turn: Turn) -> dict[str, Any]:
    """Return the calls of a turn, in OpenAI's form, as fields of the output."""
    calls = [
        {
            "id": f"call_{number}",
            "type": "function",
            "function": {"name": call.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)},
        }
        for number, call in enumerate(turn.tool_calls)
    ]
    invalid = [{"text": one.text, "reason": one.reason} for one in turn.invalid_tool_calls]
    return {"tool_calls": calls, **({"invalid_tool_calls": invalid} if invalid else {})}
