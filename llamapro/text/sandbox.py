"""Jinja for chat templates, which are programs of strangers.

The sandbox of jinja2 lets a template reach nothing. What it does not limit, time and memory, is
tried out in a process of its own, before this one renders anything.
"""

import json
import os
import subprocess
import sys
from functools import lru_cache
from typing import Any

from llamapro.errors import DataError

# Unicode's noncharacters: MARK breaks the name of a token, START and END enclose {% generation %}.
MARK, START, END = "\ufdd0", "\ufdd1", "\ufdd2"
CPU_S, MEMORY = 5, 1 << 30  # for one conversation of two turns
TRIAL = "from llamapro.text.sandbox import render_alone; render_alone()"


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

        def _enclose(self, caller: Any) -> str:
            return f"{START}{caller()}{END}"

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        text = json.dumps(value, ensure_ascii=ensure_ascii, **options)
        return text.replace("\\ufdd0", MARK)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    return environment


@lru_cache
def try_template(source: str, origin: str) -> None:
    """Renders a short conversation in another process, whose time and memory are limited.

    Raises:
        DataError: the template needs more. What else is wrong shows where it is used.
    """
    paths = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        [sys.executable, "-c", TRIAL],
        input=source.encode(),
        env=os.environ | {"PYTHONPATH": paths},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    if done.returncode < 0 or done.returncode == _TOO_MUCH:
        raise DataError(
            f"{origin}: the chat template takes over {CPU_S} s or {MEMORY >> 20} MiB for one "
            "short conversation; give another with --data.chat-template or --chat-template"
        )


_TOO_MUCH = 3  # exit status


def render_alone() -> None:
    """Renders the template on standard input, within limits; exits with `_TOO_MUCH` beyond them."""
    import resource

    source = sys.stdin.buffer.read().decode()
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    for messages in (turns[:1], turns):
        try:
            template = environment().from_string(source)
            for part in template.generate(
                messages=messages, add_generation_prompt=True, tools=None, documents=None,
                bos_token="<s>", eos_token="</s>", strftime_now=lambda form: form,
            ):  # fmt: skip
                del part
        except MemoryError:
            os._exit(_TOO_MUCH)
        except Exception:  # its own refusal, or a mistake
            continue
