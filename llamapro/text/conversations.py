"""Conversations to train on: read from files of several forms, and checked in one pass.

Files -> rows -> messages. A problem is noted with its file and row and reading continues, so that
one run names everything that has to be repaired.
"""

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from llamapro.errors import Problems
from llamapro.text.documents import SourceFile, describe_unusual
from llamapro.text.rows import SUFFIXES, UnreadableError, quote_names, read_rows

Message = dict[str, str]  # role and content
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
    """Numbers of what was read; `bytes` is the UTF-8 length of all messages.

    `documents` is the number of conversations, under the name that `TokenStore` knows.
    """

    documents: int = 0
    turns: int = 0
    bytes: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    untrained_conversations: int = 0
    other_files: int = 0

    def describe(self) -> str:
        """Returns the counts as text, those of what was left out only where they are not zero."""
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
    """Yields the conversations of the files, in order.

    A file is `.jsonl` or `.jsonl.gz` (a conversation per line), `.json` (a list of them) or
    `.parquet`. Each row is recognised by its keys: `messages` (role, content), `conversations`
    (ShareGPT: from, value), `instruction`/`input`/`output`, or `prompt` or `query` with `response`
    or `completion`; a `system` beside them becomes the first message.

    Yields "file:row", counted from 1, and the messages, each with a `role` and a `content`. The
    chat template decides whether roles and turns make sense. `problems` gets what cannot be read,
    by file and row; nothing is raised here.
    """
    for file in files:
        if not file.is_named and not file.path.name.lower().endswith(SUFFIXES):
            counts.other_files += 1
            continue
        for location, row in read_rows(file.path, problems.add, _known_columns, "conversation"):
            messages, wrong = to_messages(row)
            problems.add(*(f"{location}: {problem}" for problem in wrong))
            if not wrong:
                yield location, messages


def to_messages(row: dict[str, Any]) -> tuple[list[Message], list[str]]:
    """Returns a row's messages and no problem, or no messages and what is wrong with its form.

    Contents that are lists of text parts are joined.
    """
    row = {key: value for key, value in row.items() if value is not None}  # parquet: every column
    form = _form(row)
    if form is None:
        return [], [f"no conversation (found keys: {quote_names(row)}); {_EXPECTED}"]
    if row.get("tools"):
        return [], ["'tools' are not supported: remove the row, or the key"]
    if len(form) == 1:
        turns = row[form[0]]
        if not isinstance(turns, list):
            return [], [f"{form[0]!r} is {type(turns).__name__}, expected a list of turns"]
    else:
        question, answer = (row[key] for key in form)
        if form[0] == "instruction" and row.get("input"):
            if not isinstance(question, str) or not isinstance(row["input"], str):
                return [], ["'instruction' and 'input' are not both strings"]
            question = f"{question}\n\n{row['input']}"
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    if row.get("system"):
        turns = [{"role": "system", "content": row["system"]}, *turns]
    messages: list[Message] = []
    problems: list[str] = []
    for number, turn in enumerate(turns, 1):
        try:
            messages.append(_to_message(turn))
        except ValueError as error:
            problems.append(f"turn {number}: {error}")
    return ([], problems) if problems else (messages, [])


def _form(keys: Container[str]) -> tuple[str, ...] | None:
    """Returns the first of the forms whose keys are all there."""
    return next((form for form in _FORMS if all(key in keys for key in form)), None)


def _to_message(turn: Any) -> Message:
    """Returns a turn's role and content; raises ValueError with what is wrong with it."""
    if not isinstance(turn, dict):
        raise ValueError(f"expected role and content, found {type(turn).__name__}")
    if turn.get("tool_calls"):
        raise ValueError(
            "'tool_calls' are not supported: remove the conversation, or write them as text"
        )
    role, content = turn.get("role"), turn.get("content")
    if role is None and "from" in turn:
        role, content = turn["from"], turn.get("value")
        role = _ROLES.get(role, role) if isinstance(role, str) else role
    if not isinstance(role, str):
        raise ValueError(
            f"no role and content, or from and value (found keys: {quote_names(turn)})"
        )
    if isinstance(content, list):
        parts = [part if isinstance(part, dict) else {} for part in content]
        if kinds := {str(part.get("type")) for part in parts} - {"text"}:
            names = ", ".join(sorted(kinds))
            raise ValueError(f"the content has a part of type {names}; only text is trained on")
        texts = [part["text"] for part in parts if isinstance(part.get("text"), str)]
        if len(texts) < len(parts):
            raise ValueError("the content has a part of type text without a text")
        content = "".join(texts)
    if not isinstance(content, str):
        raise ValueError(f"the content is {type(content).__name__}, expected a string")
    try:
        content.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the content is not valid Unicode ({error.reason})") from None
    return {"role": role, "content": content}


def _known_columns(columns: list[str]) -> list[str]:
    """Returns the columns to read; raises UnreadableError if they hold no conversation."""
    if _form(columns) is None:
        found = quote_names(columns)
        raise UnreadableError(f"no column of a conversation (found: {found}); {_EXPECTED}")
    return [column for column in columns if column in _KEYS]
