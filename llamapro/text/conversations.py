"""Conversations to train on: files -> rows of several forms -> messages.

A problem is noted with its file and row, and reading continues, so that one run names everything
that has to be repaired. `messages.check_messages` checks roles and contents.
"""

import itertools
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from llamapro.errors import Problems
from llamapro.text.documents import describe_unusual
from llamapro.text.messages import Message, parsed
from llamapro.text.row_turns import (
    FOREIGN,
    MASKS,
    NAMED_ROLES,
    SAYS_TRAINED,
    SAYS_UNTRAINED,
    SWITCHES,
    is_call,
    to_message,
)
from llamapro.text.rows import SUFFIXES, UnreadableError, has_rows, quote_names, read_rows
from llamapro.text.source_files import SourceFile

# The keys under which a row may hold a conversation: a list of turns, or a question and its answer.
_FORMS: tuple[tuple[str, ...], ...] = (
    ("messages",),
    ("conversations",),  # ShareGPT
    ("conversation",),
    ("instruction", "output"),  # Alpaca, with an optional "input"
    ("instruction", "response"),  # Dolly, with an optional "context"
    ("prompt", "response"),
    ("prompt", "completion"),
    ("query", "response"),  # MetaMathQA
    ("question", "response"),  # OpenOrca, with an optional "system_prompt"
    ("question", "answer"),
)
# What may stand beside it and decides what is learned.
_BESIDE = ("system", "system_prompt", "input", "context", "history")
_VARIABLES = ("tools", "functions", "documents", "chat_template_kwargs")
# Keys of a row that would change what is learned from the whole of it, as lists and flags would.
_OF_ROWS = (*SWITCHES[:3], "sample_weight", "train", "mask", "ignore", *MASKS)
_OF_ROWS += ("train_on_input", "train_on_inputs", "train_detail", "training_detail")
_JUDGED = ("label", "kto_tag")
_CHECKED = {*_VARIABLES, *FOREIGN, *_OF_ROWS}
_KEYS = {*_BESIDE, *_CHECKED, *_JUDGED}.union(*_FORMS)
_EXPECTED = "expected messages, conversations, instruction and output, or prompt and response"


@dataclass
class ConversationCounts:
    """Counts of what was read.

    `documents` counts samples, as in `TokenStore`: a conversation is one, or one per answer, and
    then adds to `more_samples`; `bytes` is the UTF-8 length of all contents; `left_out` are the
    first of the other files; `unread` are keys that are not read, `markers` in how many
    conversations names of control tokens are plain characters.
    """

    documents: int = 0
    turns: int = 0
    bytes: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    untrained_conversations: int = 0
    other_files: int = 0
    empty_files: int = 0
    left_out: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)
    markers: dict[str, int] = field(default_factory=dict)
    more_samples: int = 0

    def describe(self) -> str:
        """Returns the counts as text."""
        unusual = {
            "conversations without a trained token left out": self.untrained_conversations,
            "samples more, because the template changes earlier turns": self.more_samples,
            f"files that are not {', '.join(SUFFIXES)} skipped": self.other_files,
            "files without a row": self.empty_files,
        }
        more = self.other_files - len(self.left_out)
        skipped = ", ".join(self.left_out) + (f" and {more:,} more" if more else "")
        share = self.trained_tokens / max(1, self.tokens)
        plain = "stands in {:,} of them as plain characters, not as the token"
        count = self.documents - self.more_samples
        return (
            f"{count:,} conversations, {self.turns:,} turns, {self.tokens:,} tokens, "
            f"{self.trained_tokens:,} of them trained ({share:.0%}){describe_unusual(unusual)}"
            + (f", skipped: {skipped}" if self.left_out else "")
            + (f", keys not read: {quote_names(self.unread)}" if self.unread else "")
            + "".join(f"; {name!r} {plain.format(n)}" for name, n in self.markers.items())
        )


class Conversation(NamedTuple):
    """The content of a row."""

    # Role, content and further keys, which the template may show. A `weight` of 0 says that a turn
    # is seen, and not trained.
    messages: list[Message]
    variables: dict[str, Any]  # further variables of the template, such as `tools`
    unread: set[str]  # keys of the row that hold something else


def read_conversations(
    files: Sequence[SourceFile], problems: Problems, counts: ConversationCounts
) -> Iterator[tuple[str, Conversation]]:
    """Yields "file:row", counted from 1, and each conversation, in order.

    A file is one that `rows` reads. Each row is recognised by its keys: `messages` (role, content),
    `conversations` (ShareGPT: from, value), `instruction`/`input`/`output` with a `history` of
    pairs, or `prompt` or `query` with `response` or `completion`; a `system` beside them becomes
    the first message. `problems` gets what cannot be read, by file and row.
    """

    def choose(columns: list[str]) -> list[str]:
        known = _known_columns(columns)
        note(columns, known)
        return known

    def note(keys: Iterable[str], read: Container[str] = ()) -> None:
        counts.unread += (k for k in sorted(keys) if k not in read and k not in counts.unread)

    for file in files:
        if file.left_out or not (file.is_named or has_rows(file.path)):
            counts.other_files += 1
            if len(counts.left_out) < 5:
                why = f" ({file.left_out})" if file.left_out else ""
                counts.left_out.append(f"{file.path}{why}")
            continue
        earlier, location = len(problems), ""
        for location, row in read_rows(file.path, problems.add, choose, "conversation"):
            try:
                conversation = to_conversation(row)
            except ValueError as error:
                problems.add(f"{location}: {error}")
            else:
                note(conversation.unread)
                yield location, conversation
        counts.empty_files += not location and len(problems) == earlier


def to_conversation(row: dict[str, Any]) -> Conversation:
    """Returns the conversation of a row; text parts of contents are joined.

    Raises ValueError if the row is no conversation, holds more than text, says two things, or has a
    key that would change what is learned and is not understood.
    """
    row = {key: value for key, value in row.items() if value is not None}  # parquet: every column
    _check_row(row)
    forms = [form for form in _FORMS if _is_filled(row, form)]
    forms = forms or [form for form in _FORMS if all(key in row for key in form)][:1]
    if not forms:
        hint = "; save 'chosen', with the prompt before it, as messages" if "chosen" in row else ""
        raise ValueError(f"no conversation (found keys: {quote_names(row)}); {_EXPECTED}{hint}")
    messages, read = _messages(row, forms[0])
    for other in forms[1:]:
        if len(other) != len(forms[0]):  # beside a list of turns, questions are notes
            continue
        if _messages(row, other)[0] != messages:
            keys, others = " and ".join(map(repr, forms[0])), " and ".join(map(repr, other))
            raise ValueError(f"{keys} say something else than {others}: keep one")
        read |= {*other}
    filled = {key for key, value in row.items() if value not in ("", [], {})}
    return Conversation(messages, _variables(row), filled - read - _CHECKED)


def _check_row(row: dict[str, Any]) -> None:
    """Raises ValueError for keys that would change what is learned from a whole row."""
    for key in FOREIGN:
        if row.get(key):
            raise ValueError(f"has {key!r}: only text is trained on")
    for key, value in row.items():
        # Perhaps one weight for each turn; a list of texts is none.
        is_list = isinstance(value, list) and value and not isinstance(value[0], (str, dict))
        says = key in _OF_ROWS or (SAYS_TRAINED.search(key) and (is_list or type(value) is bool))
        if says and value != (key in SWITCHES or not SAYS_UNTRAINED.search(key)):
            raise ValueError(f"{key!r} is {value!r:.80}: only turns have a weight, 0 or 1")
    for key in _JUDGED:
        if str(row.get(key)).lower() == "false":  # a text in CSV
            raise ValueError(f"{key!r} is False: a completion to avoid, as for KTO; leave it out")


def _messages(row: dict[str, Any], form: tuple[str, ...]) -> tuple[list[Message], set[str]]:
    """Returns the messages that one form of a row gives, and the keys that were read."""
    read = {*form}
    if len(form) == 1:
        turns = parsed(repr(form[0]), row[form[0]])
        is_table = isinstance(turns, dict) and turns.keys() & {"role", "from"}
        if is_table and all(isinstance(values, list) for values in turns.values()):
            # `datasets` keeps a sequence of turns as a list of the roles and one of the contents.
            if len({*map(len, turns.values())}) > 1:
                raise ValueError(f"{form[0]!r} has lists of several lengths")
            columns = zip(*turns.values(), strict=True)
            turns = [dict(zip(turns, turn, strict=True)) for turn in columns]
        if not isinstance(turns, list):
            raise ValueError(f"{form[0]!r} is {type(turns).__name__}, expected a list of turns")
    else:
        question, answer = (row[key] for key in form)
        given = [key for key in ("input", "context") if row.get(key)]
        if given and form[0] != "instruction":
            names = " and ".join(map(repr, form))
            raise ValueError(f"{given[0]!r} is not read beside {names}: put it into {form[0]!r}")
        for key in given:
            if not isinstance(question, str) or not isinstance(row[key], str):
                raise ValueError(f"'instruction' and {key!r} are not both strings")
            question = f"{question}\n\n{row[key]}" if question else row[key]
        # The loss is on the completion: the answers among the turns of a prompt are only seen.
        asked = [_seen(turn) for turn in _turns(question, "user")]
        turns = [*_history(row), *asked, *_turns(answer, "assistant")]
        read |= {*given, "history"}
    messages = [to_message(turn, f"turn {number}") for number, turn in enumerate(turns, 1)]
    for number, pair in enumerate(itertools.pairwise(turns), 2):
        if all(isinstance(turn, dict) and is_call(turn) for turn in pair):
            raise ValueError(f"turn {number}: a second call in a row: put both into one list")
    if all(message["role"] != "system" for message in messages[:1]):
        texts = [row[key] for key in ("system", "system_prompt") if row.get(key)]
        read |= {"system", "system_prompt"}
        if texts[1:] and texts[0] != texts[1]:
            raise ValueError("'system' says something else than 'system_prompt': keep one")
        head = [{"role": "system", "content": text} for text in texts[:1]]
        messages = [*(to_message(turn, "the system's text") for turn in head), *messages]
    return messages, read


def _turns(value: Any, role: str) -> list[Any]:
    """Returns the turns of a question or an answer: those of a list, or one that is a text."""
    return value if isinstance(value, list) else [{"role": role, "content": value}]


def _seen(turn: Any) -> Any:
    """Returns a turn of a prompt, with weight 0 if it is the assistant's."""
    role = turn.get("role", turn.get("from")) if isinstance(turn, dict) else None
    if NAMED_ROLES.get(str(role).lower(), role) != "assistant":
        return turn
    kept = {key: value for key, value in turn.items() if key not in (*SWITCHES, *MASKS)}
    return kept | {"weight": 0}


def _history(row: dict[str, Any]) -> list[Any]:
    """Returns the turns before the question, which LLaMA-Factory keeps as pairs."""
    turns = []
    history = parsed("'history'", row.get("history")) or []
    for pair in history if isinstance(history, list) else [history]:
        if not isinstance(pair, list) or len(pair) != 2:
            raise ValueError("'history' is not a list of pairs, a question and its answer")
        turns += [*_turns(pair[0], "user"), *_turns(pair[1], "assistant")]
    return turns


def _variables(row: dict[str, Any]) -> dict[str, Any]:
    """Returns the variables of the template that a row has; tools may be a text of JSON.

    OpenAI's older `functions` are tools without the object around each.
    """
    variables: dict[str, Any] = {}
    if row.get("functions") and row.get("tools"):
        raise ValueError("has 'functions' and 'tools': keep one")
    for key in _VARIABLES[::-1]:
        kind = dict if key == "chat_template_kwargs" else list
        value = parsed(repr(key), row.get(key))
        if value and not isinstance(value, kind):
            raise ValueError(f"{key!r} is {type(value).__name__}, expected a {kind.__name__}")
        if value and key in ("tools", "functions"):  # each may be a text of JSON, too
            value = [parsed(repr(key), tool) for tool in value]
            if wrong := [tool for tool in value if not isinstance(tool, dict)]:
                raise ValueError(f"{key!r} has {wrong[0]!r:.80}, expected objects")
        if value and key == "functions":
            key, value = "tools", [{"type": "function", "function": f} for f in value]
        if value:
            variables |= value if isinstance(value, dict) else {key: value}
    return variables


def _is_filled(row: dict[str, Any], form: tuple[str, ...]) -> bool:
    """Whether a row has a conversation of this form: a list of turns, or two texts or lists."""
    values = [row.get(key) for key in form]
    is_list = isinstance(values[0], (list, dict)) or str(values[0]).lstrip().startswith("[")
    is_pair = len(form) == 2 and not any(isinstance(v, dict) for v in values)
    return all(v and isinstance(v, (str, list, dict)) for v in values) and (is_pair or is_list)


def _known_columns(columns: list[str]) -> list[str]:
    """Returns the columns to read; raises UnreadableError if they hold no conversation."""
    if not any(all(key in columns for key in form) for form in _FORMS):
        found = quote_names(columns)
        raise UnreadableError(f"no column of a conversation (found: {found}); {_EXPECTED}")
    return [column for column in columns if column in _KEYS or SAYS_TRAINED.search(column)]
