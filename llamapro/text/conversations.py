"""Conversations to train on: files -> rows of several forms -> messages.

A problem is noted with its file and row, and reading continues, so that one run names everything
that has to be repaired. `chat_template.check_messages` checks roles and contents.
"""

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from llamapro.errors import Problems
from llamapro.text.chat_template import Message
from llamapro.text.documents import describe_unusual
from llamapro.text.rows import SUFFIXES, UnreadableError, has_rows, quote_names, read_rows
from llamapro.text.source_files import SourceFile

# The keys under which a row may hold a conversation: a list of turns, or a question and its answer.
_FORMS = (
    ("messages",),
    ("conversations",),  # ShareGPT
    ("instruction", "output"),  # Alpaca, with an optional "input"
    ("prompt", "response"),
    ("prompt", "completion"),
    ("query", "response"),  # MetaMathQA
)
_KEYS = {"input", "system", "tools"}.union(*_FORMS)
_ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's names
_EXPECTED = "expected messages, conversations, instruction and output, or prompt and response"


@dataclass
class ConversationCounts:
    """Counts of what was read.

    `documents` is the number of conversations, named as in `TokenStore`; `bytes` is the UTF-8
    length of all contents.
    """

    documents: int = 0
    turns: int = 0
    bytes: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    untrained_conversations: int = 0
    other_files: int = 0

    def describe(self) -> str:
        """Returns the counts as text."""
        unusual = {
            "conversations without a trained token left out": self.untrained_conversations,
            f"files that are not {', '.join(SUFFIXES)} skipped": self.other_files,
        }
        share = self.trained_tokens / max(1, self.tokens)
        return (
            f"{self.documents:,} conversations, {self.turns:,} turns, {self.tokens:,} tokens, "
            f"{self.trained_tokens:,} of them trained ({share:.0%}){describe_unusual(unusual)}"
        )


def read_conversations(
    files: Sequence[SourceFile], problems: Problems, counts: ConversationCounts
) -> Iterator[tuple[str, list[Message]]]:
    """Yields "file:row", counted from 1, and the messages of each conversation, in order.

    A file is `.jsonl` or `.jsonl.gz` (a conversation per line), `.json` (a list of them) or
    `.parquet`. Each row is recognised by its keys: `messages` (role, content), `conversations`
    (ShareGPT: from, value), `instruction`/`input`/`output`, or `prompt` or `query` with `response`
    or `completion`; a `system` beside them becomes the first message. `problems` gets what cannot
    be read, by file and row.
    """
    for file in files:
        if file.left_out or not (file.is_named or has_rows(file.path)):
            counts.other_files += 1
            continue
        for location, row in read_rows(file.path, problems.add, _known_columns, "conversation"):
            try:
                messages = to_messages(row)
            except ValueError as error:
                problems.add(f"{location}: {error}")
            else:
                yield location, messages


def to_messages(row: dict[str, Any]) -> list[Message]:
    """Returns the messages of a row, each a role and a content; text parts are joined.

    Raises:
        ValueError: the row is no conversation, or holds more than text.
    """
    row = {key: value for key, value in row.items() if value is not None}  # parquet: every column
    form = _form(row)
    if form is None:
        raise ValueError(f"no conversation (found keys: {quote_names(row)}); {_EXPECTED}")
    if row.get("tools"):
        raise ValueError("'tools' are not supported: remove the row, or the key")
    if len(form) == 1:
        turns = row[form[0]]
        if not isinstance(turns, list):
            raise ValueError(f"{form[0]!r} is {type(turns).__name__}, expected a list of turns")
    else:
        question, answer = (row[key] for key in form)
        if form[0] == "instruction" and row.get("input"):
            if not isinstance(question, str) or not isinstance(row["input"], str):
                raise ValueError("'instruction' and 'input' are not both strings")
            question = f"{question}\n\n{row['input']}"
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    if row.get("system"):
        turns = [{"role": "system", "content": row["system"]}, *turns]
    return [_to_message(turn, f"turn {number}") for number, turn in enumerate(turns, 1)]


def _form(keys: Container[str]) -> tuple[str, ...] | None:
    """Returns the first of the forms whose keys are all there."""
    return next((form for form in _FORMS if all(key in keys for key in form)), None)


def _to_message(turn: Any, place: str) -> Message:
    """Returns the role and content of a turn; raises ValueError."""
    if not isinstance(turn, dict):
        raise ValueError(f"{place}: expected role and content, found {type(turn).__name__}")
    if turn.get("tool_calls"):
        raise ValueError(
            f"{place}: 'tool_calls' are not supported: remove the conversation, or write them as "
            f"text"
        )
    role, content = turn.get("role"), turn.get("content")
    if role is None and "from" in turn:
        role, content = turn["from"], turn.get("value")
        role = _ROLES.get(str(role), role)
    if role is None:
        found = quote_names(turn)
        raise ValueError(f"{place}: no role and content, or from and value (found keys: {found})")
    if isinstance(content, list):
        parts = [part if isinstance(part, dict) else {} for part in content]
        if kinds := {str(part.get("type")) for part in parts} - {"text"}:
            names = ", ".join(sorted(kinds))
            raise ValueError(
                f"{place}: the content has a part of type {names}; only text is trained on"
            )
        texts = [part["text"] for part in parts if isinstance(part.get("text"), str)]
        if len(texts) < len(parts):
            raise ValueError(f"{place}: the content has a part of type text without a text")
        content = "".join(texts)
    return {"role": role, "content": content}


def _known_columns(columns: list[str]) -> list[str]:
    """Returns the columns to read; raises UnreadableError if they hold no conversation."""
    if _form(columns) is None:
        found = quote_names(columns)
        raise UnreadableError(f"no column of a conversation (found: {found}); {_EXPECTED}")
    return [column for column in columns if column in _KEYS]
