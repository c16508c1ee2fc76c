"""Chat templates: conversations to text and token ids, with the assistant's tokens marked.

A template is the model's own (`chat_template` of its Hugging Face files), a .jinja file, or one of
`BUILT_IN`. It is rendered as in transformers, and its text is tokenised as a whole. Unlike there,
names of control tokens in messages ("<|eot_id|>") stay plain characters.

Noncharacters mark a rendered text: `_MARK` breaks the names of tokens in messages, `_START` and
`_END` enclose {% generation %}, transformers' tag for what the assistant wrote.
"""

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llamapro.errors import DataError, suggest
from llamapro.text.tokenizer import Tokenizer
from llamapro.text.vocabulary import read_object

ROLES = ("system", "user", "assistant", "tool")
Message = Mapping[str, str]  # role and content
Span = tuple[int, int]  # first and last + 1, in bytes of the text without marks

# From the public descriptions of the formats by Meta, Mistral and OpenAI.
BUILT_IN = {
    name: (Path(__file__).parent / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")
    for name in ("llama2", "llama3", "mistral", "chatml")
}
_MARK, _START, _END = "\ufdd0", "\ufdd1", "\ufdd2"  # Unicode's noncharacters
_RESERVED = re.compile(f"[{_MARK}{_START}{_END}]")
_BORDER = re.compile(f"([{_START}{_END}])")


class ChatTemplate:
    """A Jinja template and the tokenizer of its texts.

    Attributes:
        source: the template.
        origin: the file it came from, or the name of a built-in one.
        date: what `strftime_now` formats in the template; None means now.
    """

    def __init__(self, source: str, tokenizer: Tokenizer, origin: str) -> None:
        """Compiles a template; raises DataError for a wrong one, or without jinja2."""
        try:
            import jinja2
        except ImportError:
            raise DataError(
                f"{origin}: chat templates need jinja2: pip install 'llamapro[tokenizers]'"
            ) from None
        self.source, self.origin = source, origin
        self.date: datetime.datetime | None = None
        self._tokenizer = tokenizer
        names = {token_id: name for name, token_id in tokenizer.special_tokens.items()}
        # A token that is missing is not defined, instead of "": some templates test for it.
        frame = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
        self._variables = {key: names.get(i) for key, i in frame.items() if i is not None}
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise DataError(f"{origin}: line {error.lineno}: {error.message}") from None
        # Finds the first character of each name; names may overlap.
        every_name = "|".join(re.escape(name[1:]) for name in tokenizer.special_tokens)
        firsts = "".join({re.escape(name[0]) for name in tokenizer.special_tokens})
        self._names = re.compile(f"([{firsts}])(?={every_name})" if firsts else "(?!)")

    @classmethod
    def load(
        cls, directory: str | Path, tokenizer: Tokenizer, template: str = ""
    ) -> "ChatTemplate":
        """Loads the chat template of a model, or the one that the user named.

        Args:
            directory: holds `chat_template.jinja`, or `chat_template` in `tokenizer_config.json`;
                the one named "default" is taken from a list.
            tokenizer: the model's.
            template: a name in `BUILT_IN` or a .jinja file to use instead.

        Raises:
            DataError: there is no template, it is wrong, or it needs tokens of another model.
        """
        known = ", ".join(BUILT_IN)
        if template in BUILT_IN:
            source = BUILT_IN[template]
            used = set(re.findall(r"<\|\w+\|>", source))
            if missing := sorted(used - tokenizer.special_tokens.keys()):
                raise DataError(
                    f"{tokenizer.path}: has no {', '.join(missing)}, which the chat template "
                    f"{template!r} needs: use the template of this model"
                )
            return cls(source, tokenizer, template)
        file = Path(template) if template else Path(directory, "chat_template.jinja")
        if template or file.exists():
            try:
                return cls(file.read_text(encoding="utf-8"), tokenizer, str(file))
            except (OSError, UnicodeDecodeError) as error:
                reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
                raise DataError(
                    f"{file}: the chat template cannot be read: {reason}; built-in: {known}"
                ) from None
        file = Path(directory, "tokenizer_config.json")
        stored = read_object(file).get("chat_template")
        if isinstance(stored, list):
            named = (entry for entry in stored if isinstance(entry, dict))
            stored = next((e.get("template") for e in named if e.get("name") == "default"), None)
        if not isinstance(stored, str):
            raise DataError(
                f"{directory}: the model has no chat template (chat_template.jinja, or "
                f"chat_template in tokenizer_config.json); give a .jinja file or one of {known}"
            )
        return cls(stored, tokenizer, str(file))

    @staticmethod
    def is_in(directory: str | Path) -> bool:
        """Whether a model's directory holds a chat template of its own."""
        config = read_object(Path(directory, "tokenizer_config.json"))
        return Path(directory, "chat_template.jinja").exists() or bool(config.get("chat_template"))

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        """Returns a conversation as text, as transformers' `apply_chat_template` does.

        Raises:
            DataError: the template fails or refuses the conversation.
        """
        return _RESERVED.sub("", self._render(messages, add_generation_prompt))

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Returns the token ids up to where the assistant's next answer begins.

        Raises:
            DataError: as `encode`, but no turn of the assistant is needed.
        """
        if problems := check_messages(messages, needs_assistant=False):
            raise DataError("; ".join(problems))
        return self._tokenize(_BORDER.sub("", self._render(messages, True)))[0]

    def encode(self, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
        """Returns the token ids of a conversation and which of them are trained.

        No BOS is added to the template's. A token is trained if it lies wholly in a turn of the
        assistant, which includes the end-of-turn token and excludes the header. A turn is what
        {% generation %} encloses. Without that tag it is what the turn adds to the rendering of the
        turns before it, up to its last control token if only white space follows.

        Raises:
            DataError: `check_messages` finds problems, the template fails, or it does not show
                where the assistant's turns begin.
        """
        if problems := check_messages(messages):
            raise DataError("; ".join(problems))
        marked = self._render(messages)
        ids, extents = self._tokenize(_BORDER.sub("", marked))
        if _START in marked:
            spans = _tagged_spans(marked)
        else:
            spans = [self._strip_tail(s, ids, extents) for s in self._added_spans(messages)]
        trained = [
            any(first <= start < last and end <= last for first, last in spans)
            for start, end in extents
        ]
        if not any(trained):
            raise DataError(f"{self.origin}: the template shows nothing of the assistant's turns")
        return ids, trained

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        """Returns the text with marks in it."""
        try:
            return self._template.render(
                messages=[
                    {key: self._names.sub(rf"\1{_MARK}", text) for key, text in message.items()}
                    for message in messages
                ],
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                strftime_now=(self.date or datetime.datetime.now()).strftime,
                **self._variables,
            )
        except Exception as error:  # a template is a program: any error is one of its own
            raise DataError(f"{self.origin}: {type(error).__name__}: {error}") from None

    def _tokenize(self, text: str) -> tuple[list[int], list[Span]]:
        """Returns the ids of a text and the span of each."""
        ids: list[int] = []
        spans: list[Span] = []
        begin = 0
        for part, part_ids in self._tokenizer.encode_parts(text, _MARK):
            raw = part.encode()
            end = begin + len(raw)
            ids += part_ids
            pieces = [self._tokenizer.bytes_of(i) for i in part_ids]
            whole = b"".join(pieces)
            if len(part_ids) == 1 and not whole:  # a control token
                spans.append((begin, end))
            elif whole in (raw, b" " + raw):
                position = end - len(whole)  # a space put before the text is not part of it
                for piece in pieces:
                    start, position = position, position + len(piece)
                    spans.append((max(start, begin), max(position, begin)))
            else:
                raise DataError(
                    f"{self._tokenizer.path}: changes the text {part[:40]!r}, so that nobody can "
                    f"say which tokens are the assistant's; use a tokenizer that keeps text"
                )
            begin = end
        return ids, spans

    def _added_spans(self, messages: Sequence[Message]) -> list[Span]:
        """Returns the assistant's turns: what each adds to the turns before it."""
        fix = "put {% generation %} around the assistant's text in a template of your own"
        full = self.render(messages)
        spans = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self.render(messages[:index], add_generation_prompt=True)
            after = self.render(messages[: index + 1])
            if not (after.startswith(before) and full.startswith(after)):
                raise DataError(
                    f"{self.origin}: turn {index + 1}: the template renders earlier turns "
                    f"differently once there are later ones, so where this one begins is unknown; "
                    f"{fix}"
                )
            added = after[len(before) :]
            header, _, tail = added.partition(message["content"].strip())
            # Llama 2's and Mistral's templates ignore the prompt too, but have no header; Llama 3's
            # first template puts the next header behind every answer.
            ignores_prompt = before == self.render(messages[:index])
            if ignores_prompt and (header.strip() or "assistant" in tail.lower()):
                raise DataError(
                    f"{self.origin}: turn {index + 1}: the template ignores add_generation_prompt, "
                    f"so a header would be trained, in {added[:80]!r}; {fix}"
                )
            spans.append((len(before.encode()), len(after.encode())))
        return spans

    def _strip_tail(self, span: Span, ids: list[int], extents: list[Span]) -> Span:
        """Ends a turn at its last control token if only white space, never generated, follows."""
        first, last = span
        inside = [n for n, (start, end) in enumerate(extents) if first <= start and end <= last]
        tail = b""
        for n in reversed(inside):
            piece = self._tokenizer.bytes_of(ids[n])
            if not piece and not tail.strip():
                return first, extents[n][1]
            tail = piece + tail
        return span


def check_messages(messages: Sequence[Message], needs_assistant: bool = True) -> list[str]:
    """Returns what is wrong with the roles and contents of a conversation, [] if nothing is."""
    problems = []
    for number, message in enumerate(messages, 1):
        role, content = message["role"], message["content"]
        if role not in ROLES:
            hint = suggest(str(role), list(ROLES))
            problems.append(
                f"turn {number}: unknown role {role!r}{hint}; known: {', '.join(ROLES)}"
            )
        if not isinstance(content, str):
            kind = "nothing" if content is None else type(content).__name__
            problems.append(f"turn {number}: the content is {kind}, expected a string")
        elif not content.strip():
            problems.append(f"turn {number}: the content is empty")
        elif _RESERVED.search(content):
            problems.append(
                f"turn {number}: has U+FDD0, U+FDD1 or U+FDD2, which are no characters; remove them"
            )
        elif re.search("[\ud800-\udfff]", content):
            problems.append(f"turn {number}: not valid Unicode: half a surrogate pair")
    if needs_assistant and all(message["role"] != "assistant" for message in messages):
        problems.append("no turn of the assistant: nothing to train on")
    return problems


def _tagged_spans(marked: str) -> list[Span]:
    """Returns the spans that {% generation %} enclosed."""
    spans, position, first = [], 0, 0
    for part in _BORDER.split(marked.replace(_MARK, "")):
        if part == _START:
            first = position
        elif part == _END:
            spans.append((first, position))
        else:
            position += len(part.encode())
    return spans


def _environment() -> Any:
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
            return f"{_START}{caller()}{_END}"

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        text = json.dumps(value, ensure_ascii=ensure_ascii, **options)
        return text.replace("\\ufdd0", _MARK)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    return environment
