"""A checkpoint's chat template, run in the sandbox that the reference gives it."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from lfm2vl_edge.errors import PromptError
from lfm2vl_edge.modelfile import ModelConfig


def run_template(
    config: ModelConfig, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]
) -> str:
    """Return the prompt that a model's chat template makes of messages and definitions of tools.

    Raises:
        PromptError: the template refuses them, or there are tools and it knows none.
    """
    try:
        if tools and not knows(config.chat_template, "tools"):
            raise PromptError(
                "the model's chat template knows no tools; take a model whose template does, "
                "or tell of them in a system message"
            )
        return _compiled(config.chat_template).render(
            messages=messages,
            tools=tools or None,
            add_generation_prompt=True,
            bos_token=config.bos_token,
            eos_token=config.eos_token,
        )
    except (jinja2.TemplateError, TypeError, ValueError, KeyError, ArithmeticError, RecursionError) as error:
        raise PromptError(f"the model's chat template refuses these messages: {error}") from error


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks the model's own words for training; here it is transparent."""

    tags = {"generation"}  # noqa: RUF012 - the name and type that jinja2 looks for

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@functools.lru_cache(maxsize=1)
def _environment() -> jinja2.Environment:
    """Return the environment that the reference gives a template: sandboxed, nothing can be changed."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().astimezone().strftime(form)
    environment.filters["tojson"] = _to_json
    return environment


@functools.lru_cache(maxsize=8)
def _compiled(source: str) -> jinja2.Template:
    return _environment().from_string(source)


@functools.lru_cache(maxsize=8)
def knows(source: str, name: str) -> bool:
    """Tell whether a template uses a variable or a field of a message."""
    try:
        tree = _environment().parse(source)
    except jinja2.TemplateError:  # compiling it will say why
        return True
    fields = {node.attr for node in tree.find_all(jinja2.nodes.Getattr)}
    texts = {node.value for node in tree.find_all(jinja2.nodes.Const) if isinstance(node.value, str)}
    return name in jinja2.meta.find_undeclared_variables(tree) | fields | texts


def _to_json(value: Any, indent: int | None = None) -> str:
    """Jinja's own filter escapes for HTML; the reference's does not."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
