"""Jinja for chat templates, which are programs of strangers.

The sandbox of jinja2 lets a template reach nothing. It limits neither time nor memory, so a
stranger's template is compiled and rendered in a process of its own that has limits.
"""

import datetime
import json
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import lru_cache
from typing import Any

# Unicode's noncharacters: MARK breaks the name of a token, START and END enclose {% generation %}.
MARK, START, END = "\ufdd0", "\ufdd1", "\ufdd2"
PLAIN = "_plain"  # a variable that leaves START and END out
CPU_S, MEMORY = 5, 1 << 30  # of a conversation; of the process
PROGRAM = "from llamapro.text.sandbox import serve; serve()"
Render = Callable[[dict[str, Any], datetime.datetime | None], str]


class TemplateError(Exception):
    """A template fails, or refuses what it gets; the message is its own."""


def environment() -> Any:
    """Returns Jinja as transformers' `apply_chat_template` sets it up, in a sandbox."""
    import jinja2.ext
    import jinja2.sandbox
    from jinja2 import nodes

    class Generation(jinja2.ext.Extension):
        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_enclose"), [], [], body).set_lineno(line)

        @jinja2.pass_context
        def _enclose(self, context: Any, caller: Any) -> str:
            return caller() if context.get(PLAIN) else f"{START}{caller()}{END}"

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(value: Any, *given: Any, **named: Any) -> str:
        options = zip(("ensure_ascii", "indent", "separators", "sort_keys"), given, strict=False)
        text = json.dumps(value, **{"ensure_ascii": False} | dict(options) | named)
        return text.replace("\\ufdd0", MARK)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    return environment


def compiled(source: str) -> Render:
    """Returns a template as a function of its variables and of what it takes for now."""
    import jinja2

    try:
        template = environment().from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise TemplateError(f"line {error.lineno}: {error.message}") from None

    def render(variables: dict[str, Any], now: datetime.datetime | None) -> str:
        strftime = (now or datetime.datetime.now()).strftime
        try:
            return template.render(**variables, strftime_now=strftime)
        except MemoryError:
            raise
        except Exception as error:  # a template is a program: any error is one of its own
            raise TemplateError(f"{type(error).__name__}: {error}") from None

    return render


def compiled_apart(source: str) -> Render:
    """Returns a stranger's template, which is compiled and rendered in a process with limits.

    Raises TemplateError if it is wrong, or takes too much; then it is not started again.
    """
    return _started(source, os.getpid())  # a fork must not talk to the process of another


@lru_cache
def _started(source: str, _owner: int) -> Render:
    paths = os.pathsep.join(path for path in sys.path if path)
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        env=os.environ | {"PYTHONPATH": paths},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert process.stdin and process.stdout
    requests, replies, one_at_a_time = process.stdin, process.stdout, threading.Lock()

    def ask(request: Any) -> str:
        try:
            with one_at_a_time:
                pickle.dump(request, requests)
                requests.flush()
                kind, size = replies.read(1), int.from_bytes(replies.read(8), "big")
                text = replies.read(size).decode(errors="surrogatepass")
        except OSError:
            kind = b""
        if not kind:
            raise TemplateError(
                f"the chat template takes over {CPU_S} s or {MEMORY >> 20} MiB for one "
                "conversation; give another one"
            )
        if kind == b"-":
            raise TemplateError(text)
        return text

    ask(source)
    return lambda variables, now: ask((variables, now))


def serve() -> None:
    """Renders what comes on standard input, within limits; beyond them the process ends."""
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    render: Render | None = None
    while True:
        try:
            request = pickle.load(sys.stdin.buffer)  # from the process that started this one
        except EOFError:
            return
        used = resource.getrusage(resource.RUSAGE_SELF)
        limit = int(used.ru_utime + used.ru_stime) + CPU_S
        resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))
        text, kind = "", b"+"
        try:
            if render is None:
                render = compiled(request)
            else:
                text = render(*request)
        except MemoryError:
            os._exit(1)
        except TemplateError as error:
            text, kind = str(error), b"-"
        except Exception as error:  # the compiler's own, such as RecursionError
            text, kind = f"{type(error).__name__}: {error}", b"-"
        data = text.encode(errors="surrogatepass")
        sys.stdout.buffer.write(kind + len(data).to_bytes(8, "big") + data)
        sys.stdout.buffer.flush()
