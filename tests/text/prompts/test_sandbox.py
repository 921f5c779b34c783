"""Templates that attack: what they reach for stays out of reach, and what they burn is little."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from lit_llama.errors import CheckpointError
from lit_llama.text.prompts import template
from lit_llama.text.prompts.template import JinjaStyle, Sandbox

READ = "open('CANARY').read()"
ESCAPES = [
    # walks from a value to Python's own objects
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ [].__class__.__base__.__subclasses__()[40]('CANARY').read() }}",
    "{{ ().__class__.__bases__[0].__subclasses__() }}",
    "{{ {}.__class__.__mro__[-1].__subclasses__() }}",
    "{{ (1).__class__ }}",
    "{{ messages.__class__ }}",
    "{{ messages[0].content.__class__.__mro__ }}",
    "{{ messages[0]['__class__']['__mro__'] }}",
    "{{ ''['__cla' + 'ss__']['__mro__'] }}",
    "{{ ''['\\x5f\\x5fclass\\x5f\\x5f'] ~ '' }}",
    # the same through a filter
    "{{ '' | attr('__class__') | attr('__mro__') }}",
    "{{ ('' | attr(['__cl', 'ass__'] | join)) | attr('__mro__') }}",
    "{{ [''] | map(attribute='__class__') | list }}",
    "{{ [''] | map('attr', '__class__') | map('attr', '__mro__') | list }}",
    "{{ [''] | groupby('__class__') }}",
    "{{ messages | sum(attribute='__class__') }}",
    "{{ [''] | selectattr('__class__') | list | first | attr('__class__') }}",
    # through strings that format
    "{{ '{0.__class__.__mro__}'.format(1) }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(cycler) }}",
    "{{ '{a.__class__}'.format_map({'a': 1}) }}",
    "{{ ('{0.__class__.__mro__}' | attr('format'))(1) }}",
    "{{ ['{0.__class__.__mro__}'.format] | map('call', 1) | list }}",
    "{% set f = '{0.__class__.__mro__}'.format %}{{ [1] | map(f) | list }}",
    "{% set f = '{0.__class__.__mro__}'.format %}{{ f(1) }}",
    # through what templates are given
    "{{ self.__init__.__globals__ }}",
    "{{ self._TemplateReference__context.environment }}",
    "{{ cycler.__init__.__globals__.os.popen('cat CANARY').read() }}",
    "{{ joiner.__init__.__globals__ }}",
    "{{ lipsum.__globals__['os'].popen('cat CANARY').read() }}",
    "{{ lipsum | attr('__globals__') | attr('get')('os') }}",
    "{{ namespace.__init__.__globals__ }}",
    "{% set ns = namespace(__class__=1) %}{{ ns.__class__ }}",
    "{% set ns = namespace(a=1) %}{% set ns.__init__ = 1 %}{{ ns }}",
    "{{ raise_exception.__globals__ }}",
    "{{ raise_exception.__code__ }}",
    "{{ strftime_now.__self__ }}",
    "{{ dict.__globals__ }}",
    "{{ dict.mro() }}",
    "{{ range.__class__.mro(range) }}",
    "{{ url_for.__globals__ }}{{ get_flashed_messages.__globals__ }}{{ config.items() }}{{ request.application }}",
    "{{ caller.__globals__ }}{% macro m() %}{% endmacro %}{{ m.__init__.__globals__ }}",
    "{% macro m() %}{% endmacro %}{{ m._func.__globals__ }}",
    "{{ (messages | map('upper')).gi_frame.f_globals }}",
    "{{ loop.__class__ }}{% for x in [1] %}{{ loop._iterator.__class__ }}{% endfor %}",
    "{{ environment.from_string('x') }}",
    # files and code
    "{% include 'CANARY' %}",
    "{% import 'os' as os %}{{ os.listdir('/') }}",
    "{% from 'CANARY' import x %}{{ x }}",
    "{% extends 'CANARY' %}",
    "{{ __import__('os').popen('cat CANARY').read() }}",
    "{{ " + READ + " }}",
    "{{ eval(\"" + READ + "\") }}",
    # changes to what it is given
    "{{ messages.append(1) }}",
    "{{ messages[0].update({'content': 'x'}) }}",
    "{{ messages.clear() }}",
    "{{ messages[0].__setitem__('content', 'x') }}",
    "{% set messages[0].content = 'x' %}",
]  # fmt: skip
BURNERS = [
    "{% for i in range(10**9) %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{{ 'a' * 10**10 }}",
    "{{ ('a' * 10**8) | length }}{{ 'a' * 10**7 }}",
    "{% set x = [0] * 10**10 %}",
    "{{ 10**(10**10) }}",
    "{{ (9**(9**7)) | string | length }}",
    "{{ '%999999999d' | format(1) }}",
    "{{ '%9999999999999d' % 1 }}",
    "{{ '{:>9999999999}'.format(1) }}",
    "{{ 'a'.ljust(10**10) }}",
    "{{ 'a' | center(10**10) }}",
    "{{ 'a\n' * 10**6 | indent(1000) }}",
    "{{ lipsum(n=100000) }}",
    "{{ strftime_now('%d' * 10**8) }}",
    "{% macro m(n) %}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}",
    "{% macro m(n) %}{{ m(n) }}{{ m(n) }}{% endmacro %}{{ m(0) }}",
    "{% for x in [[]] recursive %}{{ loop([[]]) }}{% endfor %}",
    "{{ " + "(" * 20000 + ")" * 20000 + " }}",
    "{% if 1 %}" * 5000,
    "{% set ns = namespace(s='a') %}{% for i in range(90) %}{% set ns.s = ns.s + ns.s %}{% endfor %}{{ ns.s }}",
    "{% for i in range(99999) %}{{ messages }}{% endfor %}",
    "{% for i in range(99999) %}{{ 'aaaaaaaaaaaaaaaaaaaaaaaaaaa' }}{% endfor %}",
    "x" * 70_000,
]
MESSAGES = [{"role": "user", "content": "Hi."}]


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    """A file that no template may read."""
    path = tmp_path / "canary"
    path.write_text("the canary's words")
    return path


def render(source: str, content: str = "Hi.") -> str:
    messages = [{"role": "user", "content": content}]
    (text,), _ = Sandbox("it").render(source, {}, [{"messages": messages, "around": ("", "")}])
    return text


@pytest.mark.parametrize("payload", ESCAPES)
def test_an_escape_is_blocked(payload: str, canary: Path) -> None:
    """Catches a template of the Hub that reads files, runs programs, or changes the messages."""
    try:
        text = render(payload.replace("CANARY", str(canary)))
    except CheckpointError as error:
        text = str(error).removeprefix("it cannot be rendered: ")
        assert text != str(error) and not any(leak in text for leak in ("canary's words", "<class", "popen("))
    else:  # what may not be reached is undefined
        assert text in ("", "[Undefined]", "[(Undefined, [''])]")


def spent() -> float:
    """Seconds of CPU of this process, and of those that it has ended."""
    return sum(os.times()[:4])


@pytest.mark.parametrize("payload", BURNERS, ids=lambda payload: payload[:60])
def test_time_and_memory_are_bounded(payload: str) -> None:
    """Catches a template that hangs the program or fills the memory, in Jinja or within one call of Python."""
    start = spent()
    with pytest.raises(CheckpointError, match=r"^chat_template\.jinja (cannot be rendered: |has )"):
        JinjaStyle(payload + "{{ messages[0].content }}").render(MESSAGES)
    assert spent() - start < 6
    assert JinjaStyle("{{ messages[0].content }}").render(MESSAGES)[0].text == "Hi.", "the next one is rendered"


def test_what_stopped_a_template_is_said() -> None:
    """Catches a message that leaves one guessing, and a bound that a long conversation reaches by itself."""
    for source, reason in (
        ("{{ 10**(10**10) }}", "it cannot be rendered: it takes longer than 2 s"),
        (
            "{% for i in range(9999) %}0123456789{% endfor %}",
            "it cannot be rendered: it writes more than 65,[56].. char",
        ),
        ("x" * 70_000, "it has 70,000 characters, more than 65,536"),
        ("{{ 'a' * 10**10 }}", "it cannot be rendered: MemoryError"),
    ):
        with pytest.raises(CheckpointError, match=reason):
            render(source)
    assert len(render("{{ messages[0].content * 3 }}", "a" * 10**6)) == 3 * 10**6


def test_a_dead_process_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a renderer that, once killed or forked from, fails or answers somebody else's question."""
    box = Sandbox("it")

    def render(text: str) -> str:
        return box.render(json.dumps(text), {}, [{"messages": [], "around": ("", "")}])[0][0]

    assert render("a") == '"a"'
    assert box._bounded.process
    os.kill(box._bounded.process.pid, signal.SIGKILL)
    box._bounded.process.wait()
    assert render("b") == '"b"'
    first = box._bounded.process
    monkeypatch.setattr(os, "getpid", lambda: 1)
    assert render("c") == '"c"' and box._bounded.process is not first
    first.kill()
    first.wait()


def test_an_interrupt_leaves_no_reply_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches Ctrl-C after which every conversation gets the text of the one before."""
    box = Sandbox("it")
    chats = [{"messages": [], "around": ("", "")}]
    assert box.render("a", {}, chats)[0] == ["a"]

    def interrupted(text: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(template.json, "loads", interrupted)
    with pytest.raises(KeyboardInterrupt):
        box.render("b", {}, chats)
    monkeypatch.undo()
    assert box.render("c", {}, chats)[0] == ["c"]


def test_threads_get_their_own_texts() -> None:
    """Catches two threads of a server that read each other's reply."""
    box, wrong = Sandbox("it"), []

    def work(name: int) -> None:
        for _ in range(50):
            (text,), _ = box.render("{{ name }}", {"name": name}, [{"messages": [], "around": ("", "")}])
            wrong.extend([text] if text != str(name) else [])

    threads = [threading.Thread(target=work, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_nothing_of_the_process_is_left(tmp_path: Path) -> None:
    """Catches a renderer that outlives the program."""
    import subprocess
    import sys

    code = (
        "from lit_llama.text.prompts import template\n"
        "template.JinjaStyle('{{ messages[0].content }}').render([{'role': 'user', 'content': 'a'}])\n"
        "print(template._SANDBOX._bounded.process.pid)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not done.stderr
    for _ in range(50):
        if not Path(f"/proc/{int(done.stdout)}").exists():
            return
        time.sleep(0.1)
    raise AssertionError("it is still there")
