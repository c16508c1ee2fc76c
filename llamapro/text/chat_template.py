"""Chat templates: conversations to text and token ids, with the assistant's tokens marked.

`template_files` finds the template. It is rendered as in transformers, and its text is tokenised as
a whole. Unlike there, names of control tokens in messages ("<|eot_id|>") stay plain characters.

Noncharacters mark a rendered text: `MARK` breaks the names of tokens in messages, `START` and
`END` enclose {% generation %}, transformers' tag for what the assistant wrote.
"""

import datetime
import itertools
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from llamapro.errors import DataError, needed, warn
from llamapro.text.messages import (
    RESERVED,
    SYSTEM,
    Forms,
    Message,
    check_messages,
    check_shown,
    flawed_call,
    not_named,
)
from llamapro.text.sandbox import MARK, PLAIN, START, TemplateError, compiled, compiled_apart
from llamapro.text.template_files import FOR_TOOLS, find_template
from llamapro.text.tokenizer import Tokenizer
from llamapro.text.turns import (
    SPACE,
    RewrittenError,
    Span,
    added_spans,
    is_of,
    joined,
    places_of,
    tagged_spans,
    trained_turns,
    without_borders,
)

# Keys of a message, and variables, that a template has to show or they would be lost.
_SHOWN = ("tool_calls", "reasoning_content", "reasoning", "thinking", "tools", "documents")


class ChatTemplate:
    """A Jinja template and the tokenizer of its texts.

    Attributes:
        origin: the file it came from, or the name of a built-in one.
        date: what `strftime_now` formats in the template; None means now.
        prints_date: whether the template asks for it.
        has_other: whether the model has another template for conversations with tools.
        plain_names: names of control tokens, as plain characters, in what was encoded last.
    """

    def __init__(
        self, source: str, tokenizer: Tokenizer, origin: str, is_trusted: bool = True
    ) -> None:
        """Compiles a template; a stranger's is rendered in a process of its own.

        Raises DataError if it is wrong, or jinja2 is missing.
        """
        self.source, self.origin = source, origin
        self.date: datetime.datetime | None = None
        self.prints_date, self.has_other = "strftime_now" in source, False
        self._tokenizer = tokenizer
        names = {token.id: name for name, token in tokenizer.added.items()}
        # A token that is missing is not defined, instead of "": some templates test for it.
        ends = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
        self._frame: dict[str, Any] = {"tools": None, "documents": None} | tokenizer.named_tokens
        self._frame |= {key: names.get(i) for key, i in ends.items() if i is not None}
        # Control tokens, and those that the template writes itself, flagged special or not.
        self._control = {t.id for n, t in tokenizer.added.items() if t.special or n in source}
        try:
            with needed(f"{origin}: chat templates need jinja2", "tokenizers", DataError):
                self._template = compiled(source) if is_trusted else compiled_apart(source)
        except TemplateError as error:
            raise DataError(f"{origin}: {error}") from None
        control = [name for name, token in tokenizer.added.items() if token.id in self._control]
        self._names = _first_characters(control)
        self._special_names = _first_characters([n for n in control if tokenizer.added[n].special])
        self._words = frozenset(re.findall(r"\w+", source))  # once: a corpus has a million chats
        self._broken = {f"{name[0]}{MARK}{name[1:]}": name for name in control}
        self.plain_names: list[str] = []

    @classmethod
    def load(
        cls, directory: str | Path, tokenizer: Tokenizer, template: str = ""
    ) -> "ChatTemplate":
        """Loads the chat template of a model, or the one that the user named.

        Raises DataError if there is no template, it is wrong, or it needs tokens of another model.

        Args:
            directory, template: as for `find_template`.
        """
        found = find_template(directory, template)
        if found.is_built_in:
            used = set(re.findall(r"<\|\w+\|>", found.source))
            if missing := sorted(used - tokenizer.added.keys()):
                raise DataError(
                    f"{tokenizer.path}: has no {', '.join(missing)}, which the chat template "
                    f"{template!r} needs: use the template of this model"
                )
        made = cls(found.source, tokenizer, found.origin, is_trusted=found.is_built_in)
        made.has_other = found.has_other
        return made

    @cached_property
    def _forms(self) -> Forms:
        """The forms in which the template takes messages."""

        def show(message: Message) -> str:
            asked, is_first = {"role": "user", "content": "a"}, message["role"] in SYSTEM
            turns = [message, asked] if is_first else [asked, message]
            if message["role"] == "user":
                turns = [message]
            try:
                return self._template(self._frame | {"messages": turns}, self.date)
            except TemplateError:
                return ""

        return Forms(show)

    def render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Returns a conversation as text, as transformers' `apply_chat_template` does.

        Raises DataError if the template fails or refuses the conversation.
        """
        values = {**(variables or {}), PLAIN: True}
        return RESERVED.sub("", self._render(messages, add_generation_prompt, values))

    def hidden(self, messages: Sequence[Message], variables: Mapping[str, Any]) -> set[str]:
        """Returns the keys of turns, and the variables, that the template never names."""
        return not_named(messages, variables, self._words)

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Returns the token ids up to where the assistant's next answer begins.

        Raises DataError as `encode`, but no turn of the assistant is needed.
        """
        if problems := check_messages(messages, needs_assistant=False):
            raise DataError("; ".join(problems))
        return self._tokenize(self._render(messages, True, {PLAIN: True}))[0]

    def end_ids(self) -> set[int]:
        """Returns the control tokens that the template puts behind an answer; says so if none."""
        ends: set[int] = set()
        asked = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        try:
            ids, trained = self.encode(asked)
        except DataError:
            return ends
        for token_id in reversed([*itertools.compress(ids, trained)]):
            if token_id in self._control:
                ends.add(token_id)
            elif self._tokenizer.bytes_of(token_id).strip():
                break
        if not ends:
            warn(
                f"{self.origin}: no token ends the last answer of a conversation, so a model does "
                "not learn from it where to stop; put {{ eos_token }} there"
            )
        return ends

    def samples(
        self, messages: Sequence[Message], variables: Mapping[str, Any] | None = None
    ) -> list[tuple[list[int], list[bool]]]:
        """Returns what is trained on of a conversation: all of it once, or a sample per answer.

        Qwen3's template leaves out the reasoning of earlier turns. If a template renders earlier
        turns differently, each answer is trained behind the turns as they are shown before it.
        Raises DataError as `encode` does.
        """
        try:
            return [self.encode(messages, variables)]
        except RewrittenError:
            seen = [{**m, "weight": 0} if m["role"] == "assistant" else m for m in messages]
            return [
                self.encode([*seen[:index], answer], variables)
                for index, answer in trained_turns(messages)
            ]

    def encode(
        self, messages: Sequence[Message], variables: Mapping[str, Any] | None = None
    ) -> tuple[list[int], list[bool]]:
        """Returns the token ids of a conversation and which of them are trained.

        No BOS is added to the template's. A token is trained if it lies in a turn of the
        assistant, which includes the end-of-turn token and excludes the header. One with words of
        the turn may begin or end with white space that is outside. A turn is what
        {% generation %} encloses. Without that tag it is what the turn adds to the rendering of the
        turns before it, up to its last control token if only white space follows. A turn whose
        `weight` is 0 is not trained.

        Args:
            messages: role, content and what else the template shows.
            variables: further variables of the template, such as `tools`.

        Raises:
            RewrittenError: the template renders earlier turns differently once there are later
                ones; `samples` knows what to do.
            DataError: `check_messages` finds problems, the template fails, or it does not show
                where the assistant's turns begin.
        """
        variables = variables or {}
        problems = check_messages(messages)
        lost = self.hidden(messages, variables).intersection(_SHOWN)
        if self.has_other and variables.get("tools"):
            other = "the model has another chat template for tools"
            problems.append(f"{other}: name it with --data.chat-template {FOR_TOOLS}")
        problems += [f"the chat template does not show {key!r}" for key in sorted(lost)]
        if problems:
            raise DataError("; ".join(problems))
        marked = self._render(messages, False, variables)
        broken = self._broken if MARK in marked else {}
        self.plain_names = [name for text, name in broken.items() if text in marked]
        ids, extents = self._tokenize(without_borders(marked))
        tools = variables.get("tools") or []
        if problems := check_shown(messages, RESERVED.sub("", marked), tools):
            raise DataError(f"{self.origin}: {problems[0]}")
        if START in marked:
            plain = self.render(messages, False, variables)
            if plain != RESERVED.sub("", marked):  # a filter took the marks for text
                raise DataError(f"{self.origin}: changes what {{% generation %}} encloses")
            spans = tagged_spans(marked, messages, self.origin)
        else:
            spans = added_spans(
                lambda turns, prompts: self.render(turns, prompts, variables),
                messages,
                self._frame.get("eos_token") or "",
                self.origin,
            )
            spans = [self._strip_tail(span, ids, extents) for span in spans]
        raw, spans = RESERVED.sub("", marked).encode(), joined(spans)
        trained = [any(is_of(raw, extent, span) for span in spans) for extent in extents]
        if not any(trained) and any(trained_turns(messages)):
            raise DataError(f"{self.origin}: the template shows nothing of the assistant's turns")
        return ids, trained

    def _render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Returns the text with marks in it.

        A template may look for a name, such as "</think>", which it would not find with a mark in
        it. Then names of tokens that are not flagged special get none.
        """
        frame, values = self._frame, {**(variables or {})}
        values["add_generation_prompt"] = add_generation_prompt
        try:
            shown = enumerate(messages, 1)
            values["messages"] = [self._forms.view(m, f"turn {number}") for number, m in shown]
            marked = self._marked(values, self._names)
            text = self._template(frame | marked, self.date)
            if marked == values:
                return text
            plain = RESERVED.sub("", self._template(frame | values, self.date))
            if RESERVED.sub("", text) != plain:
                text = self._template(frame | self._marked(values, self._special_names), self.date)
            if RESERVED.sub("", text) != plain:
                names = [n for n in self._tokenizer.special_tokens if n in str(values)]
                raise ValueError(
                    f"renders a message otherwise because it holds {names or 'a token'!s:.80}, the "
                    "name of a special token; remove it, or flag the token as not special"
                )
            return text
        except (TemplateError, ValueError, RecursionError) as error:
            raise DataError(f"{self.origin}: {error}{flawed_call(messages)}") from None

    def _marked(self, value: Any, names: re.Pattern[str]) -> Any:
        """Returns a value in whose texts these names of tokens are broken by marks."""
        if isinstance(value, str):
            if RESERVED.search(value):
                raise ValueError("U+FDD0, U+FDD1 and U+FDD2 are no characters; remove them")
            return names.sub(rf"\1{MARK}", value)
        if isinstance(value, dict):
            return {self._marked(k, names): self._marked(v, names) for k, v in value.items()}
        return [self._marked(v, names) for v in value] if isinstance(value, list) else value

    def _tokenize(self, text: str) -> tuple[list[int], list[Span]]:
        """Returns the ids of a text and the span of each."""
        ids: list[int] = []
        spans: list[Span] = []
        begin = 0
        for part, part_ids in self._tokenizer.encode_parts(text, MARK):
            raw = part.encode()
            end = begin + len(raw)
            ids += part_ids
            pieces = [self._tokenizer.bytes_of(i) for i in part_ids]
            whole = b"".join(pieces)
            if len(part_ids) == 1 and not whole:  # a control token
                spans.append((begin, end))
            elif whole.endswith(shown := part.replace(SPACE, " ").encode()) and (
                whole[: -len(shown)] in (b"", b" ")
            ):
                # Sentencepiece writes a space as U+2581, so that character is one for it.
                places = places_of(part, begin)
                position = len(shown) - len(whole)  # -1: a space put before the text is no part
                for piece in pieces:
                    start, position = position, position + len(piece)
                    spans.append((places[max(start, 0)], places[max(position, 0)]))
            elif (ends := self._tokenizer.ends_of(part, part_ids)) is not None:
                widths = (len(character.encode()) for character in part)
                places = list(itertools.accumulate(widths, initial=begin))
                ends = list(itertools.accumulate(ends, max, initial=0))
                spans += ((places[a], places[b]) for a, b in itertools.pairwise(ends))
            else:
                raise DataError(
                    f"{self._tokenizer.path}: changes the text {part[:40]!r}, and its library does "
                    "not say which tokens are the assistant's; use a tokenizer that keeps text"
                )
            begin = end
        return ids, spans

    def _strip_tail(self, span: Span, ids: list[int], extents: list[Span]) -> Span:
        """Ends a turn at its last control token if only white space, never generated, follows."""
        first, last = span
        inside = [n for n, (start, end) in enumerate(extents) if first <= start and end <= last]
        tail = b""
        for n in reversed(inside):
            if ids[n] in self._control and not tail.strip():
                return first, extents[n][1]
            tail = self._tokenizer.bytes_of(ids[n]) + tail
        return span


def _first_characters(names: Sequence[str]) -> re.Pattern[str]:
    """Returns a pattern that finds the first character of each name; names may overlap."""
    every_name = "|".join(re.escape(name[1:]) for name in names)
    firsts = "".join({re.escape(name[0]) for name in names})
    return re.compile(f"([{firsts}])(?={every_name})" if firsts else "()(?!)")
