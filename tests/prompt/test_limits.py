"""Templates that never end or fill memory: each ends as a PromptError, in a process with limits of its own."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from lfm2vl_edge import PromptError
from tests.prompt.test_render import rendered

DOUBLED = "{% set ns = namespace(x=%s) %}{% for i in range(60) %}{% set ns.x = %s %}{% endfor %}{{ ns.x }}"
HOSTILE = {
    "power": "{{ 9**(9**9) }}",
    "power of a variable": "{% set n = messages|length + 8 %}{{ n**(n**n) }}",
    "product": DOUBLED.replace("%s", "10", 1).replace("%s", "ns.x * ns.x", 1),
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "loops without a round": "{% for a in range(99999) %}{% for b in range(99999) if false %}{% endfor %}{% endfor %}",
    "macros": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "width": "{{ '%999999999d' % 1 }}",
    "width in braces": "{{ '{:999999999}'.format(1) }}",
    "width as an argument": "{{ '{:{}}'.format(1, 999999999) }}",
    "width after a key": "{{ '%(a)999999999d' % {'a': 1} }}",
    "width of a filter": "{{ '%999999999d'|format(1) }}",
    "width of a time": "{{ strftime_now('%0999999999d') }}",
    "text times a number": "{{ 'a' * 999999999 }}",
    "list times a number": "{{ (999999999 * [0])|length }}",
    "center": "{{ 'a'|center(999999999) }}",
    "method center": "{{ 'a'.center(999999999) }}",
    "method by a filter": "{{ ('a'|attr('ljust'))(999999999) }}",
    "filter by map": "{{ ['a']|map('center', 999999999)|list }}",
    "indent": "{{ [1]|tojson(indent=999999999) }}",
    "batch": "{{ [1]|batch(99999999, 'x')|list }}",
    "doubled text": DOUBLED.replace("%s", "'aaaa'", 1).replace("%s", "ns.x ~ ns.x", 1),
    "doubled list": DOUBLED.replace("%s", "[1]", 1).replace("%s", "ns.x + ns.x", 1),
    "shared lists": DOUBLED.replace("%s", "[1]", 1).replace("%s", "[ns.x, ns.x]", 1),
    "blocks": "{% set x %}aaaaaaaa{% endset %}" + "{% set x %}{{ x }}{{ x }}{% endset %}" * 40 + "{{ x }}",
    "replace": "{{ ('a'*100000).replace('a', 'b'*100000) }}",
    "join": "{{ range(99999)|join('b'*100000) }}",
    "sums": "{{ ([range(99999)]*9999)|map('sum')|list }}",
    "words": "{{ ('a '*4000000)|wordwrap(1) }}",
    "slices": "{% set s = 'a'*4000000 %}" + "".join(f"{{% set v{i} = s[{i}:] %}}" for i in range(99)),
}
CHILD = """
import resource, sys, time
from lfm2vl_edge import PromptError
from tests.prompt.test_limits import HOSTILE
from tests.prompt.test_render import rendered
rendered([{"role": "user", "content": "hi"}])
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
for name, template in HOSTILE.items():
    before, start = peak(), time.process_time()
    try:
        rendered([{"role": "user", "content": "hi"}], template)
        print(name, "is accepted")
    except PromptError as error:
        if len(str(error)) > 400 or "\\n" in str(error):
            print(name, "has a long message")
    if peak() - before > 200 or time.process_time() - start > 2:
        print(name, "takes", peak() - before, "MB and", time.process_time() - start, "seconds")
print("done")
"""


def test_hostile_templates_end_within_limits() -> None:
    done = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, timeout=100)
    assert done.stdout == "done\n", done.stderr[-500:]


def test_errors_of_templates_are_one_short_line() -> None:
    with pytest.raises(PromptError) as raised:
        rendered([{"role": "user", "content": "hi"}], "{{ raise_exception('first\nsecond\x1b' * 50000) }}")
    assert "first second?" in str(raised.value)
    assert str(raised.value).isprintable()
    assert len(str(raised.value)) < 400


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ 2**10 * 3 + 7 % 4 }} {{ 'ab' * 3 }} {{ [1] * 2 + [3] }}", "3075 ababab [1, 1, 3]"),
        ("{{ '**%s**: %5.1f' % ('a', 2.5) }} {{ '{:>5} {{}}'.format('a') }}", "**a**:   2.5     a {}"),
        ("{{ 'a-b'.replace('-', '+') }}{{ ['a', 'b']|join(', ') }}{{ ', '.join('ab') }}", "a+ba, ba, b"),
        ("{{ 'a'|center(3) }}|{{ 'a'.ljust(3) }}|{{ 'a\nb'|indent(2) }}", " a |a  |a\n  b"),
        (
            "{% for x in range(9) if x % 2 %}{{ loop.index }}{{ x }}{{ '' if loop.last else ',' }}{% endfor %}",
            "11,23,35,47",
        ),
        ("{% macro f(x) %}[{{ x }}{{ caller() }}]{% endmacro %}{% call f(1) %}c{% endcall %}", "[1c]"),
        ("{% for x in [1, [2, [3]]] recursive %}{{ x if x is number else loop(x) }}{% endfor %}", "123"),
        (
            "{% set ns = namespace(n=0) %}{% for m in messages[0:] %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
            "1",
        ),
        (
            "{% filter upper %}a{% endfilter %}{% set x %}b{% endset %}{{ x ~ 1 }}{{ [[1], [2]]|sum(start=[]) }}",
            "Ab1[1, 2]",
        ),
        ("{{ {'a': [1, 'é']}|tojson(indent=1) }}", '{\n "a": [\n  1,\n  "é"\n ]\n}'),
    ],
)
def test_ordinary_templates_are_as_before(template: str, expected: str) -> None:
    assert rendered([{"role": "user", "content": "hi"}], template) == [expected]


def test_a_long_conversation_is_not_refused() -> None:
    conversation = [
        {"role": "user" if turn % 2 == 0 else "assistant", "content": "word " * 2000} for turn in range(301)
    ]
    start = time.process_time()
    assert rendered(conversation)
    assert time.process_time() - start < 2
