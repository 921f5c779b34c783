"""Renderer of chat templates in a process of its own: JSON lines in, JSON lines out.

A template is a program that somebody else wrote. Here it meets Jinja's sandbox, and what the sandbox lets through --
endless loops, strings of gigabytes, numbers of a million digits -- ends with this process and not with the caller's.
The file imports nothing of the library, so that the process starts in a tenth of a second.
"""

import json
import resource
import signal
import sys
from collections.abc import Callable
from datetime import datetime
from functools import lru_cache
from typing import Any

from jinja2 import StrictUndefined, Template, TemplateError, Undefined, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

_MEMORY = 512 << 20
_TODAY = datetime(2024, 7, 26)  # what Llama 3.1's template takes where it has no clock: every day the same prompt


class _Generation(Extension):
    """transformers' {% generation %} block: what is in it is what the assistant generates."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja declares it
    around = "", ""

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Callable[[], str]) -> str:
        return caller().join(self.around)


class _Names(Namespace):
    """A namespace without names that begin with an underscore, which lead into Python's own objects."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # as Jinja's, so that one of the names may be `self`
        values = dict(*args[1:], **kwargs)
        for name in values:
            _Names._check(name)
        Namespace.__init__(args[0], values)

    def __setitem__(self, name: str, value: Any) -> None:
        _Names._check(name)  # an attribute of `self` would be one of the template's names
        super().__setitem__(name, value)

    @staticmethod
    def _check(name: object) -> None:
        if str(name).startswith("_"):
            raise SecurityError(f"a namespace holds no {name!r}")


def _refuse(message: str) -> None:
    raise TemplateError(message)


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """Without Jinja's HTML escapes."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


@lru_cache(8)
def _compile(source: str, strict: bool = False) -> tuple[Template, list[str], type[_Generation]]:
    """The template, the tags that it looks for in contents, and its {% generation %} block."""

    class Generation(_Generation):
        """One for each template, as it holds what stands around the blocks."""

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined if strict else Undefined,
        extensions=["jinja2.ext.loopcontrols", Generation],
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(raise_exception=_refuse, strftime_now=_TODAY.strftime, namespace=_Names, dict=_dict)
    return environment.from_string(source), _tags(environment.parse(source)), Generation


def _tags(tree: nodes.Template) -> list[str]:
    """Texts such as </think> that a template tests for, or hands to a method such as split."""
    tests = [node.expr for node in tree.find_all(nodes.Compare) if node.ops[0].op in ("in", "notin")]
    arguments = [argument for call in tree.find_all(nodes.Call) for argument in call.args]
    texts = {node.value for node in (*tests, *arguments) if isinstance(node, nodes.Const)}
    return [text for text in texts if isinstance(text, str) and text[:1] in ("<", "[") and text[-1] in (">", "]")]


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    """Render every chat of a request, each into no more characters than there is room for."""
    try:
        template, tags, block = _compile(request["source"], request.get("strict", False))
        texts = []
        for chat in request["chats"]:
            block.around = chat.get("around", ("", ""))
            parts, room = [], request["room"]
            for part in template.generate(**request["names"] | chat.get("names", {}), messages=chat["messages"]):
                room -= len(part)
                if room < 0:
                    raise TemplateError(f"it writes more than {request['room']:,} characters")
                parts.append(part)
            texts.append("".join(parts))
        return {"texts": texts, "tags": tags}
    except Exception as error:  # a template may fail in any way
        return {"error": (str(error) or type(error).__name__)[:2000]}


def main() -> None:
    """Answer until the input ends. A request that takes too long ends the process, whatever it is busy with."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for line in sys.stdin:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, request["seconds"])
        reply = json.dumps(_answer(request))
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(reply, flush=True)


if __name__ == "__main__":
    main()
