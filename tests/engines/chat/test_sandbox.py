from __future__ import annotations

import time

import pytest

from engines.chat.jinja import ChatTemplate
from engines.errors import TemplateError

LOOP_40 = "{% for i in range(40) %}"
NS = '{% set ns = namespace(s="12345678") %}' + LOOP_40
DEEP = "{% set ns = namespace(l=[1]) %}{% for i in range(60) %}{% set ns.l = [ns.l, ns.l] %}{% endfor %}"

HOSTILE = {
    "nested empty loops": "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}"
    "{% endfor %}{% endfor %}{% endfor %}",
    "nested loops that print": "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}",
    "loop with a filter": "{% for a in range(99999) if a < 0 %}{% endfor %}" * 500,
    "recursive macro": "{% macro m(n) %}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}",
    "two macros that call each other twice": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}"
    "{% endmacro %}{{ m(60) }}",
    "recursive loop": "{% for x in [[1]] recursive %}{{ loop([[1]]) }}{% endfor %}",
    "multiplied text": '{{ "a" * 10**9 }}',
    "multiplied from the left": '{{ 10**9 * "a" }}',
    "multiplied list": "{{ ([0] * 10**9) | length }}",
    "doubling by ~": NS + "{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "doubling by +": NS + "{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "doubling by a macro": "{% macro d(s) %}{{ s }}{{ s }}{% endmacro %}" + NS + "{% set ns.s = d(ns.s) %}{% endfor %}",
    "doubling by a set block": NS + "{% set ns.s %}{{ ns.s }}{{ ns.s }}{% endset %}{% endfor %}",
    "doubling by a format": NS + '{% set ns.s = "{0}{0}".format(ns.s) %}{% endfor %}',
    "doubling by join": NS + "{% set ns.s = [ns.s, ns.s] | join %}{% endfor %}",
    "doubling a list by +": "{% set ns = namespace(s=[1]) %}" + LOOP_40 + "{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "doubling a list by extend": "{% set l = [1] %}" + LOOP_40 + "{% set _ = l.extend(l) %}{% endfor %}",
    "source text in a loop": "{% set s %}{% for i in range(99999) %}" + "x" * 9999 + "{% endfor %}{% endset %}",
    "center": '{{ "a".center(10**9) }}',
    "ljust": '{{ "a".ljust(10**9) }}',
    "zfill": '{{ "a".zfill(10**9) }}',
    "center filter": '{{ "a" | center(10**9) }}',
    "constant center filter": '{{ "a" | center(1000000000) }}',
    "indent filter": '{{ ("a\n" * 99999) | indent(99999) }}',
    "indent filter by text": '{{ ("a\n" * 99999) | indent("x" * 99999) }}',
    "expandtabs": '{{ "\t".expandtabs(10**9) }}',
    "expandtabs by name": '{{ "\t".expandtabs(tabsize=10**9) }}',
    "format width": '{{ "{:>1000000000}".format(1) }}',
    "computed format width": '{{ "{:>{}}".format(1, 10**9) }}',
    "many format fields": '{{ ("{:>9999}" * 99999).format(*([1] * 99999)) }}',
    "one text in many format fields": '{{ ("{0}" * 9999).format("x" * 99999) }}',
    "format_map": '{{ ("{a}" * 9999).format_map({"a": "x" * 99999}) }}',
    "power": "{{ 10 ** (10 ** 8) }}",
    "power of powers": "{% set ns = namespace(n=2**4000) %}" + LOOP_40 + "{% set ns.n = ns.n**4000 %}{% endfor %}",
    "squares": "{% set ns = namespace(n=3) %}" + LOOP_40 + "{% set ns.n = ns.n * ns.n %}{% endfor %}",
    "% formatting": '{{ "%1000000000d" % 1 }}',
    "% formatting filter": '{{ "%1000000000d" | format(1) }}',
    "% formatting of bytes": '{{ "%1000000000d".encode() % 1 }}',
    "bytes": '{{ "a".encode().center(10**9) | length }}',
    "bytes of an integer": '{{ (5).to_bytes(10**9, "big") | length }}',
    "translate": '{{ ("a" * 9999).translate({97: "b" * 99999}) }}',
    "method as a sort key": '{% set l = [10**9] %}{{ l.sort(key="x".center) }}',
    "replace": '{{ ("a" * 99999).replace("a", "b" * 99999) }}',
    "replace of nothing": '{{ ("a" * 99999).replace("", "b" * 99999) }}',
    "replace filter": '{{ ("a" * 99999) | replace("a", "b" * 99999) }}',
    "join with a long separator": '{{ ("a" * 99999).join(["b"] * 99999) }}',
    "join filter with a long separator": '{{ (["b"] * 99999) | join("a" * 99999) }}',
    "join of one long text": '{{ (["a" * 999999] * 999) | join | length }}',
    "join of a generator": '{{ "".join((["a" * 999999] * 999) | map("upper")) | length }}',
    "tojson indent": "{{ [1, 2] | tojson(indent=10**9) }}",
    "tojson separators": '{{ ([1] * 9999) | tojson(separators=("x" * 99999, ":")) }}',
    "nested list printed": DEEP + "{{ ns.l }}",
    "nested list joined": DEEP + '{{ ns.l ~ "" }}',
    "nested list as JSON": DEEP + "{{ ns.l | tojson }}",
    "nested list as text": DEEP + "{{ ns.l | string }}",
    "nested list in upper case": DEEP + "{{ ns.l | upper }}",
    "nested list in a format": DEEP + '{{ "{}".format(ns.l) }}',
    "list that holds itself": "{% set l = [] %}{% set _ = l.append(l) %}{{ l }}",
    "batch": '{{ [1] | batch(10**9, "x") | list }}',
    "slice": "{{ [1] | slice(10**9) | list }}",
    "round": '{{ 2.5 | round(10**8, "floor") }}',
    "sum of lists": "{{ ([[1] * 9999] * 9999) | sum(start=[]) }}",
    "many lists": "{% set l = [] %}{% for i in range(99999) %}{% set _ = l.append(range(99999) | list) %}{% endfor %}",
    "many texts": '{% set l = [] %}{% for i in range(99999) %}{% set _ = l.append("a" * 999999) %}{% endfor %}',
    "large range": "{{ range(10**9) | list }}",
    "class": '{{ "".__class__.__mro__ }}{{ "".__class__.__mro__[1].__subclasses__() }}',
    "class through a filter": '{{ ("" | attr("__class__")).mro() }}',
    "class through a format": '{{ "{0.__class__.__mro__}".format("") }}',
    "globals": "{{ raise_exception.__globals__.os }}",
    "import": '{{ cycler.__init__.__globals__.os.system("true") }}',
    "include": '{% include "/etc/passwd" %}',
    "extends": '{% extends "/etc/passwd" %}',
    "wrong JSON": '{{ "{" | from_json }}',
    "deep JSON": '{{ ("[" * 99999) | from_json }}',
    "dictionary changed in its loop": "{% set d = {1: 1} %}{% for k in d %}{% set _ = d.update({2: 2}) %}{% endfor %}",
    "loops that Python cannot nest": "{% for a in [1] %}" * 30 + "{% endfor %}" * 30,
    "conditions that Python cannot nest": "{% if 1 %}" * 200 + "{% endif %}" * 200,
    "parentheses": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "negations": "{{ " + "not " * 3000 + "1 }}",
    "sums": "{{ " + "1+" * 30000 + "1 }}",
    "unfinished": "{% if",
    "a source too long": "x" * (256 * 1024 + 1),
}


@pytest.mark.parametrize("source", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_templates_are_refused_quickly(source: str) -> None:
    """A template that would hang, fill the memory or look into Python is an error within seconds."""
    started = time.monotonic()
    with pytest.raises(TemplateError):
        ChatTemplate(source).render([])
    assert time.monotonic() - started < 5


def test_the_meter_starts_afresh_with_every_render() -> None:
    """What one request's render has spent does not count against the next."""
    template = ChatTemplate('{{ "a" * 1000000 }}{{ "a" * 1000000 }}')
    lengths = {len(template.render([])) for _ in range(40)}
    assert lengths == {2_000_000}


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ('{{ "a" * 3 }}{{ [0] * 2 }}{{ 2**10 }}{{ 7 % 4 }}', "aaa[0, 0]10243"),
        ('{{ "{}: {:>5.2f}|{x}".format("a", 2.5, x="y") }}', "a:  2.50|y"),
        ('{{ "x".center(5) }}{{ "7".zfill(3) }}', "  x  007"),
        ('{{ "a,b".split(",") | join("+") }}{{ ", ".join(["a", "b"] | map("upper")) }}', "a+bA, B"),
        ('{{ "a\nb" | indent(2) }}', "a\n  b"),
        ('{{ "aXb".replace("X", "--") }}{{ "aXb" | replace("X", "") }}', "a--bab"),
        ("{% set l = [1] %}{% set _ = l.append(2) %}{% set _ = l.extend([3]) %}{{ l.pop() }}{{ l }}", "3[1, 2]"),
        ('{{ {"b": 1, "a": 2} | dictsort }}{{ [3, 1] | sort }}', "[('a', 2), ('b', 1)][1, 3]"),
        ('{{ "1" ~ 2 ~ none ~ [] }}', "12None[]"),
        ('{% set n = namespace(a=1) %}{% set n.a = n.a + 1 %}{{ n.a }}{{ dict(x=1)["x"] }}', "21"),
    ],
)
def test_what_real_templates_use_is_left_alone(source: str, text: str) -> None:
    """Limits do not change the result of anything of ordinary size."""
    assert ChatTemplate(source).render([]) == text
