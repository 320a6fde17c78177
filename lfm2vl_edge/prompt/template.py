"""A checkpoint's chat template, a program of strangers: run as transformers runs it, with bounded time and memory."""

from __future__ import annotations

import functools
import json
import operator
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, Final, NoReturn, cast

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
import jinja2.sandbox
import jinja2.utils

from lfm2vl_edge.config import ModelConfig
from lfm2vl_edge.errors import PromptError, clip, printable, shorten
from lfm2vl_edge.host import importing

_MAX_TEMPLATE: Final = 1 << 18
"""Characters of a chat template; the published ones have 1,000 to 20,000."""
_MAX_SECONDS: Final = 1.0
"""Processor time of one rendering, which takes some milliseconds."""
_MAX_COST: Final = 1 << 23
"""Characters that a template may make with small messages, all intermediate texts together."""
_ELEMENT_COST: Final = 16
"""Cost of an element of a list, in characters."""
_MAX_BITS: Final = 4096
"""Size of an integer that a template computes."""
_MAX_FORMAT: Final = 4096
"""Characters of a format, as in `"%s: %s" % (name, text)`."""
_LARGE_WIDTH: Final = re.compile(r"%(\(.*\))?[^a-zA-Z%]*(\d{5}|\*)|\{[^{}]*(\d{5}|\{)", re.DOTALL)
"""A width in a format that is large, or that comes from an argument."""
_GROWING: Final = frozenset(
    ("batch", "center", "expandtabs", "indent", "ljust", "rjust", "slice", "to_bytes", "tojson")
)
"""Filters and methods whose result can be their text's length times a number; and those in both sets."""
_SLOW: Final = frozenset(("pprint", "striptags", "title", "urlize", "wordcount", "xmlattr"))
"""Filters that work in Python or with regular expressions; and those in both sets."""
_BOTH: Final = frozenset(("truncate", "wordwrap", "zfill"))
_METER: Final = threading.local()
"""Of the rendering of a thread: the `cost` left, the number of `steps`, and the `deadline` of its processor time."""


def run_template(
    config: ModelConfig,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]],
    options: Mapping[str, Any],
) -> str:
    """Return the prompt that a model's chat template makes of messages and definitions of tools.

    Raises:
        PromptError: the template refuses them, or there are tools and it does not use them.
    """
    source = config.template_for(tools=bool(tools))
    if tools and not uses_name(source, "tools"):
        raise PromptError(
            "the model's chat template does not support tools; use a model whose template does, "
            "or describe them in a system message"
        )
    if len(source) > _MAX_TEMPLATE:
        raise PromptError(f"the chat template has {len(source)} characters; at most {_MAX_TEMPLATE} are supported")
    variables = {**config.special_tokens, "documents": None, "add_generation_prompt": True, **options}
    _METER.cost, _METER.steps, _METER.deadline = 1 << 62, 0, time.thread_time() + _MAX_SECONDS
    _METER.cost = _MAX_COST + 64 * _cost([messages, tools])
    try:
        return _compiled(source).render({**variables, "messages": messages, "tools": tools or None})
    except Exception as error:  # the template is a program of the checkpoint, and its errors are not ours
        what = printable(" ".join(str(error)[:3000].split())) or type(error).__name__
        raise PromptError(f"the model's chat template refuses these messages: {what:.300}") from error


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks the model's own words for training; here it has no effect."""

    tags = {"generation"}  # noqa: RUF012 - the name and type that jinja2 expects

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@functools.lru_cache(maxsize=1)
def _environment() -> jinja2.Environment:
    """Return the environment that transformers gives a template: sandboxed, nothing can be changed."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().astimezone().strftime(_checked_format(form))
    del environment.globals["lipsum"]
    environment.filters["tojson"] = _to_json
    _limit(environment)
    return environment


def _limit(environment: jinja2.sandbox.SandboxedEnvironment) -> None:
    """Make every operator, filter and test spend, see `_METER`: jinja's sandbox bounds neither time nor memory."""
    operators = {"+": operator.add, "*": _multiplied, "**": _power, "%": _modulo}
    environment.binop_table |= {name: functools.partial(_binary, work) for name, work in operators.items()}
    environment.intercepted_binops = frozenset(operators)
    tables: tuple[dict[str, Any], ...] = (environment.filters, environment.tests)
    for table in tables:
        table |= {name: _metered(name, work) for name, work in table.items()}
    environment.filters.update(_tick=_tick, _made=_made, _stored=_stored, _callable=_callable)
    environment.filters["_sliced"] = _metered("", lambda value: value)  # without the sizes of its elements


def _spend(cost: int) -> None:
    _METER.cost -= cost
    _METER.steps += 1  # reading the time takes longer than most steps
    if _METER.cost < 0 or ((cost > 16384 or not _METER.steps % 32) and time.thread_time() > _METER.deadline):
        raise jinja2.TemplateError("it takes too much time or memory; use the published model, or correct it")


@jinja2.pass_context  # so that it is not computed when the template is compiled
def _tick(_context: jinja2.runtime.Context, cost: int) -> str:
    _spend(cost)
    return ""


def _cost(value: object) -> int:
    """Return the size of a value in characters; what a list holds twice counts twice, and what is too large ends."""
    total, waiting = 0, [value]
    while waiting:
        one = waiting.pop()
        total += _ELEMENT_COST
        if isinstance(one, str | bytes):
            total += len(one)
        elif isinstance(one, dict):
            waiting += one.keys()
            waiting += one.values()
        elif isinstance(one, list | tuple | set | frozenset):
            waiting += one
        elif isinstance(one, jinja2.utils.Namespace):
            raise jinja2.TemplateError("a namespace within a list, an object or a namespace is not supported")
        if total + _ELEMENT_COST * len(waiting) > _METER.cost:
            _spend(total + _ELEMENT_COST * len(waiting))
    return total


def _made(value: Any) -> Any:
    """Spend the size of a value that a template made, and return it."""
    if isinstance(value, str):
        _spend(len(value))
    elif isinstance(value, list | tuple | dict):
        _spend(_cost(value))
    return value


def _stored(value: Any) -> Any:
    """Return a value that becomes a field of a namespace: it must not be a namespace, or hold one."""
    _cost([value])
    return value


def _binary(work: Callable[[Any, Any], Any], left: Any, right: Any) -> Any:
    return _made(work(left, right))


def _multiplied(left: Any, right: Any) -> Any:
    if isinstance(left, int) and isinstance(right, int):
        _check_bits(left.bit_length() + right.bit_length())
    elif isinstance(left, int) or isinstance(right, int):
        text, count = (right, left) if isinstance(left, int) else (left, right)
        _spend(len(text) * max(0, count) if hasattr(text, "__len__") else 0)
    return left * right


def _power(left: Any, right: Any) -> Any:
    if isinstance(left, int) and isinstance(right, int):
        _check_bits(left.bit_length() * abs(right))
    return left**right


def _check_bits(n_bits: int) -> None:
    if n_bits > _MAX_BITS:
        raise jinja2.TemplateError(f"it computes an integer of more than {_MAX_BITS} bits")


def _modulo(left: Any, right: Any) -> Any:
    return (_checked_format(left) if isinstance(left, str) else left) % right


def _checked_format(form: str) -> str:
    if len(form) > _MAX_FORMAT or _LARGE_WIDTH.search(form.replace("{{", "").replace("}}", "")):
        raise jinja2.TemplateError(f"the format {clip(form)} is too long, or has a width that is too large")
    return form


def _metered(name: str, work: Callable[..., Any]) -> Callable[..., Any]:
    """Return a filter, a test or a text's method that spends what it makes, and refuses to make too much."""

    @functools.wraps(work)
    def metered(*args: Any, **kwargs: Any) -> Any:
        values = [list(one) if isinstance(one, Iterator) else one for one in args] if name in {"join", "sum"} else args
        owner = getattr(work, "__self__", None)
        _spend(_ELEMENT_COST + _growth(name, [owner, *values, *kwargs.values()]))
        result = work(*values, **kwargs)
        if isinstance(result, str | bytes | list | tuple | dict):
            _spend(len(result) * (1 if isinstance(result, str | bytes) else _ELEMENT_COST))
        return result

    return metered


def _growth(name: str, values: Sequence[Any]) -> int:
    """Return the cost of a filter or method beyond that of its result, before it runs."""
    numbers = [abs(one) for one in values if isinstance(one, int)]
    texts = [len(one) for one in values if isinstance(one, str | bytes)]
    lists = [one for one in values if isinstance(one, list | tuple | Mapping | range)]
    if name == "sum":  # of lists; each sum is a new one
        return len(lists[0]) * _cost(lists[0]) if len(lists) > 1 else 0
    if name in {"replace", "join", "translate"}:
        parts = [_cost(one) for one in lists] if name == "translate" else texts if lists else texts[1:]
        each = max(parts, default=0)
        return max([len(one) for one in lists] + texts[:1], default=0) * each
    if name in {"format", "format_map"}:
        _checked_format(next((one for one in values if isinstance(one, str)), ""))
    if name == "round" and max(numbers, default=0) > _MAX_BITS:
        _check_bits(max(numbers))
    size = sum(texts) + sum(map(_cost, lists)) + 1 if name in _GROWING | _SLOW | _BOTH else 0
    return size * ((max(numbers, default=1) if name in _GROWING | _BOTH else 0) + (64 if name in _SLOW | _BOTH else 0))


def _callable(work: Any) -> Any:
    """Return what a template may call in place of `work`: methods of texts and numbers are metered."""
    if work is jinja2.utils.Namespace:
        return _namespace
    name, owner = getattr(work, "__name__", ""), getattr(getattr(work, "__wrapped__", work), "__self__", None)
    if name in {"format", "format_map"} and isinstance(owner, str):  # the sandbox has wrapped them
        _checked_format(owner)
    is_metered = name in _GROWING | _BOTH | {"join", "replace", "translate"} and isinstance(owner, str | bytes | int)
    return _metered(name, work) if is_metered else work


def _namespace(*args: Any, **kwargs: Any) -> jinja2.utils.Namespace:
    _cost([*args, kwargs])
    return jinja2.utils.Namespace(*args, **kwargs)


def _metered_tree(node: Any) -> Any:
    """Return a part of a parsed template whose loops, texts, lists and calls spend, see `_METER`; it is changed."""
    for name, value in node.iter_fields():
        if isinstance(value, list):
            setattr(node, name, [_metered_tree(one) if isinstance(one, jinja2.nodes.Node) else one for one in value])
        elif isinstance(value, jinja2.nodes.Node):
            setattr(node, name, _metered_tree(value))
    if isinstance(node, jinja2.nodes.Output):
        _meter_output(node)
    _meter_body(node)
    if isinstance(node, jinja2.nodes.Getitem) and isinstance(node.arg, jinja2.nodes.Slice):
        return _through("_sliced", node)
        return _through("_made", node)
    if isinstance(node, jinja2.nodes.Call):
        node.node = _through("_callable", node.node)
    is_made = isinstance(node, jinja2.nodes.Call | jinja2.nodes.Concat | jinja2.nodes.List | jinja2.nodes.Dict)
    is_made |= isinstance(node, jinja2.nodes.Tuple) and node.ctx == "load"
    return _through("_made", node) if is_made else node


def _meter_body(node: jinja2.nodes.Node) -> None:
    """Let each round of a loop and each call of a macro spend, and check what a namespace stores."""
    if isinstance(node, jinja2.nodes.For | jinja2.nodes.Macro | jinja2.nodes.CallBlock):
        node.body.insert(0, jinja2.nodes.ExprStmt(_spending(_ELEMENT_COST)))
    if isinstance(node, jinja2.nodes.For) and node.test is not None:
        node.test = jinja2.nodes.And(jinja2.nodes.Not(_spending(_ELEMENT_COST)), node.test)
    if isinstance(node, jinja2.nodes.CallBlock):
        node.call = cast("Any", node.call).node  # without the filter around it
    if isinstance(node, jinja2.nodes.Assign) and isinstance(node.target, jinja2.nodes.NSRef):
        node.node = _through("_stored", node.node)


def _meter_output(node: jinja2.nodes.Output) -> None:
    is_data = [isinstance(one, jinja2.nodes.TemplateData) for one in node.nodes]
    size = sum(len(one.data) for one in node.nodes if isinstance(one, jinja2.nodes.TemplateData))
    shown = [one if plain else _through("_made", one) for one, plain in zip(node.nodes, is_data, strict=True)]
    node.nodes = [*([_spending(size)] if size else []), *shown]


def _through(name: str, node: Any) -> jinja2.nodes.Filter:
    return jinja2.nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _spending(cost: int) -> jinja2.nodes.Filter:
    return _through("_tick", jinja2.nodes.Const(cost, lineno=1))


@functools.lru_cache(maxsize=8)
def _compiled(source: str) -> jinja2.Template:
    environment = _environment()
    with importing():  # the lexer imports a codec
        tree = _metered_tree(environment.parse(source))
    tree.set_environment(environment)
    tree.set_lineno(1)
    return jinja2.Template.from_code(environment, environment.compile(tree), environment.make_globals(None))


@functools.lru_cache(maxsize=8)
def uses_name(source: str, name: str) -> bool:
    """Return whether a template uses a variable or a field of a message."""
    try:
        tree = _environment().parse(source)
    except jinja2.TemplateError:  # compiling it will report why
        return True
    fields = {node.attr for node in tree.find_all(jinja2.nodes.Getattr)}
    texts = {node.value for node in tree.find_all(jinja2.nodes.Const) if isinstance(node.value, str)}
    return name in jinja2.meta.find_undeclared_variables(tree) | fields | texts


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes for HTML; transformers' does not, and has these arguments in this order."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: object) -> NoReturn:
    raise jinja2.TemplateError(message if isinstance(message, str) else shorten(message))
