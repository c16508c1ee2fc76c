"""Chat templates: conversations to text and token ids, with the assistant's tokens marked.

A template is the model's own (`chat_template` of its Hugging Face files), a .jinja file, or one of
`BUILT_IN`. It is rendered as transformers does, and its text is tokenised as a whole. One thing is
stricter: names of control tokens in what people wrote ("<|eot_id|>") stay plain characters.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llamapro.errors import DataError, suggest
from llamapro.text.templates import BUILT_IN, END, MARK, START, environment, tagged_spans
from llamapro.text.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant", "tool")
Message = Mapping[str, Any]

_RESERVED = re.compile(f"[{MARK}{START}{END}]")


class ChatTemplate:
    """A Jinja template and the tokenizer its text is for.

    Attributes:
        source: the template.
        where: the file it came from, or the name of a built-in one.
    """

    def __init__(self, source: str, tokenizer: Tokenizer, where: str) -> None:
        """Compiles a template; see `load`.

        Raises:
            DataError: it is not a template, or Jinja is not installed.
        """
        try:
            import jinja2
        except ImportError:
            raise DataError(
                f"{where}: chat templates need jinja2: pip install 'llamapro[tokenizers]'"
            ) from None
        self.source, self.where = source, where
        self._tokenizer = tokenizer
        # What is expected of a template at work: its own complaints and Python's about its values.
        self._failures = (
            *(jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError),
            *(ArithmeticError, RecursionError),
        )
        names = {token_id: name for name, token_id in tokenizer.special_tokens.items()}
        frame = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
        # None, not "": templates of models without one of them ask for it.
        self._variables = {
            "tools": None,
            "documents": None,
            **{key: names.get(i) for key, i in frame.items() if i is not None},
        }
        try:
            self._template = environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise DataError(f"{where}: line {error.lineno}: {error.message}") from None
        # The first character of each name, overlapping ones too.
        every_name = "|".join(re.escape(name[1:]) for name in tokenizer.special_tokens)
        firsts = "".join({re.escape(name[0]) for name in tokenizer.special_tokens})
        self._names = re.compile(f"([{firsts}])(?={every_name})" if firsts else "(?!)")

    @classmethod
    def load(
        cls, directory: str | Path, tokenizer: Tokenizer, template: str = ""
    ) -> "ChatTemplate":
        """Finds the chat template to use.

        Args:
            directory: of the model: `chat_template.jinja`, or `chat_template` in
                `tokenizer_config.json` (of several, the one named "default").
            tokenizer: the model's.
            template: instead: a name in `BUILT_IN`, or a .jinja file.

        Raises:
            DataError: there is none, it is no template, or it is of another model's tokens.
        """
        directory = Path(directory)
        if template in BUILT_IN:
            source = BUILT_IN[template]
            used = set(re.findall(r"<\|\w+\|>", source))
            if missing := sorted(used - tokenizer.special_tokens.keys()):
                raise DataError(
                    f"{tokenizer.path}: has no {', '.join(missing)}, which the chat template "
                    f"{template!r} needs: use the template of this model"
                )
            return cls(source, tokenizer, template)
        if template:
            return cls(
                _read(Path(template), f"; built-in: {', '.join(BUILT_IN)}"), tokenizer, template
            )
        file = directory / "chat_template.jinja"
        if file.exists():
            return cls(_read(file), tokenizer, str(file))
        file = directory / "tokenizer_config.json"
        try:
            found = json.loads(_read(file)).get("chat_template") if file.exists() else None
            if isinstance(found, list):
                found = {entry["name"]: entry["template"] for entry in found}.get("default")
        except (ValueError, AttributeError, KeyError, TypeError) as error:
            raise DataError(f"{file}: chat_template cannot be read ({error!r})") from None
        if not isinstance(found, str):
            raise DataError(
                f"{directory}: the model has no chat template (chat_template.jinja, or "
                f"chat_template in tokenizer_config.json); give a .jinja file or one of "
                f"{', '.join(BUILT_IN)}"
            )
        return cls(found, tokenizer, str(file))

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        """Returns a conversation as text, as transformers' `apply_chat_template` does.

        Raises:
            DataError: the template fails or refuses the conversation.
        """
        return _RESERVED.sub("", self._render(messages, add_generation_prompt))

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Returns the token ids up to where the assistant's next answer begins.

        Raises:
            DataError: as for `encode`; the conversation may lack an assistant's turn.
        """
        if problems := check_messages(messages, needs_assistant=False):
            raise DataError("; ".join(problems))
        return self._tokenize(re.sub(f"[{START}{END}]", "", self._render(messages, True)))[0]

    def encode(self, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
        """Returns the token ids of a conversation and which of them the assistant wrote.

        The ids are those of the whole rendered text; no BOS is added to the template's. Trained
        are the tokens that lie wholly in an assistant's turn, its end-of-turn token included, its
        header not. Turns are what {% generation %} encloses; for templates without it, what a turn
        adds to the rendering of the turns before it, white space after its last control token left
        out.

        Args:
            messages: each with `role` and `content`.

        Raises:
            DataError: `check_messages` finds problems, the template fails, or it does not say where
                the assistant's turns begin: it renders earlier turns differently once there are
                later ones.
        """
        if problems := check_messages(messages):
            raise DataError("; ".join(problems))
        marked = self._render(messages)
        text = re.sub(f"[{START}{END}]", "", marked)
        ids, extents = self._tokenize(text)
        has_tags = START in marked
        spans = tagged_spans(marked) if has_tags else self._added_spans(messages)
        if not has_tags:
            spans = [self._without_tail(span, ids, extents) for span in spans]
        trained = [False] * len(ids)
        for first, last in spans:
            for index, (start, end) in enumerate(extents):
                trained[index] |= first <= start < last and end <= last
        if not any(trained):
            raise DataError(f"{self.where}: the template shows nothing of the assistant's turns")
        return ids, trained

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        """Returns the text with marks in it."""
        try:
            return self._template.render(
                messages=self._protect(list(messages)),
                add_generation_prompt=add_generation_prompt,
                **self._variables,
            )
        except self._failures as error:
            raise DataError(f"{self.where}: {type(error).__name__}: {error}") from None

    def _protect(self, value: Any) -> Any:
        """Returns a message with the names of control tokens broken by marks."""
        if isinstance(value, str):
            return self._names.sub(rf"\1{MARK}", value)
        if isinstance(value, Mapping):
            return {key: self._protect(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._protect(item) for item in value]
        return value

    def _tokenize(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Returns the ids and where each begins and ends, in bytes of the text without marks."""
        ids: list[int] = []
        extents: list[tuple[int, int]] = []
        at = 0
        for part, more in self._tokenizer.encode_parts(text, MARK):
            size = len(part.encode())
            ids += more
            pieces = [self._tokenizer.bytes_of(i) for i in more]
            whole = b"".join(pieces)
            if len(more) == 1 and not whole:  # a control token
                extents.append((at, at + size))
            elif whole in (part.encode(), b" " + part.encode()):
                end = at - (len(whole) - size)  # a space put before the text is not part of it
                for piece in pieces:
                    start, end = end, end + len(piece)
                    extents.append((max(start, at), max(end, at)))
            else:
                raise DataError(
                    f"{self._tokenizer.path}: changes the text {part[:40]!r}, so that nobody can "
                    f"say which tokens are the assistant's; use a tokenizer that keeps text"
                )
            at += size
        return ids, extents

    def _added_spans(self, messages: Sequence[Message]) -> list[tuple[int, int]]:
        """Returns where the assistant's turns are: what they add to the turns before them."""
        full = self.render(messages)
        spans = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            where = f"{self.where}: turn {index + 1}"
            before = self.render(messages[:index], add_generation_prompt=True)
            after = self.render(messages[: index + 1])
            if not (after.startswith(before) and full.startswith(after)):
                raise DataError(
                    f"{where}: the template renders earlier turns differently once there are later "
                    f"ones, so where this one begins is unknown; put {{% generation %}} around the "
                    f"assistant's text in a template of your own"
                )
            added, content = after[len(before) :], str(message.get("content") or "").strip()
            header, _, tail = added.partition(content) if content else (added, "", "")
            # Llama 2's and Mistral's ignore it too, but have no header; Llama 3's first template
            # puts the next one behind every answer.
            ignored = before == self.render(messages[:index])
            if ignored and (header.strip() or "assistant" in tail.lower()):
                raise DataError(
                    f"{where}: the template ignores add_generation_prompt, so a header would be "
                    f"trained, in {added[:80]!r}; put {{% generation %}} around the assistant's "
                    f"text in a template of your own"
                )
            spans.append((len(before.encode()), len(after.encode())))
        return spans

    def _without_tail(
        self, span: tuple[int, int], ids: list[int], extents: list[tuple[int, int]]
    ) -> tuple[int, int]:
        """Ends a span at its last control token if only white space follows: never generated."""
        first, last = span
        inside = [n for n, (start, end) in enumerate(extents) if first <= start and end <= last]
        tail = b""
        for n in reversed(inside):
            piece = self._tokenizer.bytes_of(ids[n])
            if not piece and not tail.strip():
                return first, extents[n][1]
            tail = piece + tail
        return span


def check_messages(messages: Any, needs_assistant: bool = True) -> list[str]:
    """Returns what is wrong with a conversation, [] if nothing is.

    Args:
        messages: should be a list of mappings with `role`, one of `ROLES`, and `content`, a string
            that is not empty; an assistant's turn may have `tool_calls` instead of it.
        needs_assistant: a turn of the assistant must be among them.
    """
    if not isinstance(messages, list | tuple) or not messages:
        return [f"expected a list of turns, found {messages!r:.40}"]
    problems = []
    for number, message in enumerate(messages, 1):
        if not isinstance(message, Mapping):
            problems.append(f"turn {number}: expected an object, found {message!r:.40}")
            continue
        role, content = message.get("role"), message.get("content")
        if "role" not in message:
            keys = ", ".join(map(repr, message)) or "nothing"
            problems.append(f"turn {number}: no 'role' (found: {keys})")
        elif role not in ROLES:
            hint = suggest(str(role), list(ROLES))
            problems.append(
                f"turn {number}: unknown role {role!r}{hint}; known: {', '.join(ROLES)}"
            )
        if content is None and role == "assistant" and message.get("tool_calls"):
            continue
        if not isinstance(content, str):
            found = type(content).__name__ if "content" in message else "nothing"
            problems.append(f"turn {number}: 'content' should be a string, found {found}")
        elif not content.strip():
            problems.append(f"turn {number}: empty 'content'")
    strings = json.dumps(messages, ensure_ascii=False, default=str)
    if _RESERVED.search(strings):
        problems.append("has U+FDD0, U+FDD1 or U+FDD2, which are no characters; remove them")
    if re.search("[\ud800-\udfff]", strings):
        problems.append("not valid Unicode: half a surrogate pair")
    roles = [message.get("role") for message in messages if isinstance(message, Mapping)]
    if needs_assistant and "assistant" not in roles:
        problems.append("no turn of the assistant: nothing to train on")
    return problems


def _read(file: Path, hint: str = "") -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise DataError(f"{file}: the chat template cannot be read: {reason}{hint}") from None
