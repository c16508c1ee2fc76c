"""Conversations to train on: files -> rows of several forms -> messages.

A problem is noted with its file and row, and reading continues, so that one run names everything
that has to be repaired. `messages.check_messages` checks roles and contents.
"""

import json
import re
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from llamapro.errors import Problems
from llamapro.files import unique_keys
from llamapro.text.documents import describe_unusual
from llamapro.text.messages import ROLES, Message, says_more
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
_FOREIGN = ("image", "images", "audio", "audios", "video", "videos")  # these would be lost
# Keys of a turn that say whether it is trained: by 1, and by 0. Others of such names are refused.
_SWITCHES = (*"weight loss_weight loss_mask train_mask train training trainable loss".split(),)
_MASKS = ("masked", "is_masked")
_WORDS = "train(ed|ing|able)?|learn|loss(es)?|mask(s|ed)?|weights?|ignored?|excluded?"
_SAYS_TRAINED = re.compile(f"(?<!attention)(^|_)({_WORDS})(_|$)")
_SAYS_UNTRAINED = re.compile("mask|ignore|exclude|(^|_)(no|on)_|detail")
# Keys of a row that would change what is learned from the whole of it, as lists and flags would.
_OF_ROWS = (*_SWITCHES[:3], "sample_weight", "train", "mask", "ignore", *_MASKS)
_OF_ROWS += ("train_on_input", "train_on_inputs", "train_detail", "training_detail")
_JUDGED = ("label", "kto_tag")
_CHECKED = {*_VARIABLES, *_FOREIGN, *_OF_ROWS, *_JUDGED}
_KEYS = {*_BESIDE, *_CHECKED}.union(*_FORMS)
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "observation": "tool"}
_EXPECTED = "expected messages, conversations, instruction and output, or prompt and response"


@dataclass
class ConversationCounts:
    """Counts of what was read.

    `documents` counts samples, as in `TokenStore`: a conversation is one, or one per answer, and
    then adds to `more_samples`; `bytes` is the UTF-8 length of all contents; `unread` are keys that
    are not read, `markers` in how many conversations names of control tokens are plain characters.
    """

    documents: int = 0
    turns: int = 0
    bytes: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    untrained_conversations: int = 0
    other_files: int = 0
    empty_files: int = 0
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
        share = self.trained_tokens / max(1, self.tokens)
        plain = "stands in {:,} of them as plain characters, not as the token"
        count = self.documents - self.more_samples
        return (
            f"{count:,} conversations, {self.turns:,} turns, {self.tokens:,} tokens, "
            f"{self.trained_tokens:,} of them trained ({share:.0%}){describe_unusual(unusual)}"
            + (f", keys not read: {quote_names(self.unread)}" if self.unread else "")
            + "".join(f"; {name!r} {plain.format(n)}" for name, n in self.markers.items())
        )


class Conversation(NamedTuple):
    """What a row holds.

    Attributes:
        messages: role, content and further keys, which the template may show. A `weight` of 0 says
            that a turn is seen, and not trained.
        variables: further variables of the template, such as `tools`.
        unread: keys of the row that hold something else.
    """

    messages: list[Message]
    variables: dict[str, Any]
    unread: set[str]


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

    Raises:
        ValueError: the row is no conversation, holds more than text, says two things, or has a key
            that would change what is learned and is not understood.
    """
    row = {key: value for key, value in row.items() if value is not None}  # parquet: every column
    _check_row(row)
    forms = [form for form in _FORMS if _is_filled(row, form)]
    forms = forms or [form for form in _FORMS if all(key in row for key in form)][:1]
    if not forms:
        raise ValueError(f"no conversation (found keys: {quote_names(row)}); {_EXPECTED}")
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
    for key in _FOREIGN:
        if row.get(key):
            raise ValueError(f"has {key!r}: only text is trained on")
    for key, value in row.items():
        # Perhaps one weight for each turn; a list of texts is none.
        is_list = isinstance(value, list) and value and not isinstance(value[0], (str, dict))
        says = key in _OF_ROWS or (_SAYS_TRAINED.search(key) and (is_list or type(value) is bool))
        if says and value != (key in _SWITCHES or not _SAYS_UNTRAINED.search(key)):
            raise ValueError(f"{key!r} is {value!r:.80}: only turns have a weight, 0 or 1")
    for key in _JUDGED:
        if row.get(key) is False:
            raise ValueError(f"{key!r} is False: a completion to avoid, as for KTO; leave it out")


def _messages(row: dict[str, Any], form: tuple[str, ...]) -> tuple[list[Message], set[str]]:
    """Returns the messages that one form of a row gives, and the keys that were read."""
    read = {*form}
    if len(form) == 1:
        turns = _parsed(form[0], row[form[0]])
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
    messages = [_to_message(turn, f"turn {number}") for number, turn in enumerate(turns, 1)]
    if all(message["role"] != "system" for message in messages[:1]):
        texts = [row[key] for key in ("system", "system_prompt") if row.get(key)]
        read |= {"system", "system_prompt"}
        if texts[1:] and texts[0] != texts[1]:
            raise ValueError("'system' says something else than 'system_prompt': keep one")
        head = [{"role": "system", "content": text} for text in texts[:1]]
        messages = [*(_to_message(turn, "the system's text") for turn in head), *messages]
    return messages, read


def _turns(value: Any, role: str) -> list[Any]:
    """Returns the turns of a question or an answer: those of a list, or one that is a text."""
    return value if isinstance(value, list) else [{"role": role, "content": value}]


def _seen(turn: Any) -> Any:
    """Returns a turn of a prompt, with weight 0 if it is the assistant's."""
    role = turn.get("role", turn.get("from")) if isinstance(turn, dict) else None
    if _ROLES.get(str(role).lower(), role) != "assistant":
        return turn
    kept = {key: value for key, value in turn.items() if key not in (*_SWITCHES, *_MASKS)}
    return kept | {"weight": 0}


def _history(row: dict[str, Any]) -> list[Any]:
    """Returns the turns before the question, which LLaMA-Factory keeps as pairs."""
    turns = []
    history = _parsed("history", row.get("history")) or []
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
        value = _parsed(key, row.get(key))
        if value and not isinstance(value, kind):
            raise ValueError(f"{key!r} is {type(value).__name__}, expected a {kind.__name__}")
        if value and key == "functions":
            key, value = "tools", [{"type": "function", "function": f} for f in value]
        if value:
            variables |= value if isinstance(value, dict) else {key: value}
    return variables


def _parsed(key: str, value: Any) -> Any:
    """Returns what a text of JSON, as tables often hold, stands for; other values as they are."""
    try:
        is_text = isinstance(value, str) and value
        return json.loads(value, object_pairs_hook=unique_keys) if is_text else value
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{key!r} is a text that is no JSON ({error})") from None


def _is_filled(row: dict[str, Any], form: tuple[str, ...]) -> bool:
    """Whether a row has a conversation of this form: a list of turns, or two texts or lists."""
    values = [row.get(key) for key in form]
    is_list = isinstance(values[0], list) or str(values[0]).lstrip().startswith("[")
    return all(v and isinstance(v, (str, list)) for v in values) and (len(form) == 2 or is_list)


def _to_message(turn: Any, place: str) -> Message:
    """Returns a turn with role, content, its other keys and, if it has one, its weight.

    Raises:
        ValueError: it has no role or more than text, or a weight that cannot be honoured.
    """
    if not isinstance(turn, dict):
        raise ValueError(f"{place}: expected role and content, found {type(turn).__name__}")
    role, content = turn.get("role"), turn.get("content")
    for one, other in (("role", "from"), ("content", "value"), ("content", "text")):
        a, b = (_ROLES.get(str(v).lower(), v) for v in map(turn.get, (one, other)))
        if None not in (a, b) and a != b and (one == "content" or b in ROLES):
            raise ValueError(f"{place}: {other!r} says something else than {one!r}: keep one")
    if role is None and "from" in turn:
        role, content = turn["from"], turn.get("value", content)
    if content is None:
        content = turn.get("value", turn.get("text"))
    role = _ROLES.get(str(role).lower(), role)
    if role is None:
        found = quote_names(turn)
        raise ValueError(f"{place}: no role and content, or from and value (found keys: {found})")
    for key in _FOREIGN:
        if turn.get(key):
            raise ValueError(f"{place}: has {key!r}: only text is trained on")
    if isinstance(content, list):
        parts = [part if isinstance(part, dict) else {} for part in content]
        if kinds := {str(part.get("type")) for part in parts} - {"text"}:
            names = ", ".join(sorted(kinds))
            raise ValueError(f"{place}: a part of type {names}; only text is trained on")
        keys = (key for part in parts for key, value in part.items() if value is not None)
        if weights := [*filter(_SAYS_TRAINED.search, keys)]:
            raise ValueError(f"{place}: a part of the content has {weights[0]!r}: cut the turn")
        if not all(isinstance(part.get("text"), str) for part in parts):
            raise ValueError(f"{place}: the content has a part of type text without a text")
        content = "".join(part["text"] for part in parts)
    if call := turn.get("function_call"):  # OpenAI's older form of one call
        if turn.get("tool_calls"):
            raise ValueError(f"{place}: has 'function_call' and 'tool_calls': keep one")
        turn = turn | {"tool_calls": [{"type": "function", "function": call}]}
    turn = turn | {"tool_calls": _parsed("tool_calls", turn.get("tool_calls"))}
    if content is None and (says_more(turn) or ("content" in turn and role == "tool")):
        content = ""  # a tool may return nothing
    known = ("role", "content", "from", "value", "text", "function_call", *_SWITCHES, *_MASKS)
    others = {key: v for key, v in turn.items() if key not in known and v is not None}
    return {"role": role, "content": content} | others | _weight(turn, role, place)


def _weight(turn: dict[str, Any], role: str, place: str) -> dict[str, int]:
    """Returns {"weight": 0} for a turn that is not trained, {} for others.

    OpenAI says it by `weight`, axolotl by `train`, ms-swift by `loss`, torchtune by `masked`.
    """
    for key, value in turn.items():
        if key in (*_SWITCHES, *_MASKS) or not _SAYS_TRAINED.search(key) or value is None:
            continue
        if value or not _SAYS_UNTRAINED.search(key):
            raise ValueError(f"{place}: {key!r} is not read; cut the turn, or give it a weight")
    said = {key: turn[key] for key in (*_SWITCHES, *_MASKS) if turn.get(key) is not None}
    if wrong := [f"{key!r} is {value!r}" for key, value in said.items() if value not in (0, 1)]:
        raise ValueError(f"{place}: {wrong[0]}; only 0 and 1 are understood")
    said = {key: bool(value) == (key not in _MASKS) for key, value in said.items()}
    if len(set(said.values())) > 1:
        raise ValueError(f"{place}: {' and '.join(map(repr, said))} contradict each other")
    if role != "assistant" and any(said[key] for key in said if key != "weight"):
        raise ValueError(f"{place}: only turns of the assistant are trained, this is of {role!r}")
    return {} if all(said.values()) else {"weight": 0}


def _known_columns(columns: list[str]) -> list[str]:
    """Returns the columns to read; raises UnreadableError if they hold no conversation."""
    if not any(all(key in columns for key in form) for form in _FORMS):
        found = quote_names(columns)
        raise UnreadableError(f"no column of a conversation (found: {found}); {_EXPECTED}")
    return [column for column in columns if column in _KEYS or _SAYS_TRAINED.search(column)]
