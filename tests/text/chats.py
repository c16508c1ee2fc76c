"""Files of conversations: how the tests of them write and read them."""

import json
from pathlib import Path
from typing import Any

import pytest

from llamapro.errors import DataError, Problems
from llamapro.text.conversations import Conversation, ConversationCounts, read_conversations
from llamapro.text.source_files import find_files

ASKED = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
ROW = {"messages": ASKED}


def read(*paths: Path) -> tuple[list[tuple[str, Conversation]], Problems]:
    """Returns what is read from files or folders, and the problems."""
    problems, counts = Problems(limit=20), ConversationCounts()
    files = find_files([str(path) for path in paths])
    return list(read_conversations(files, problems, counts)), problems


def lines_of(problems: Problems) -> list[str]:
    """Returns the problems' lines of the error that they become."""
    with pytest.raises(DataError) as raised:
        problems.check(DataError, "conversations", one_per_line=True)
    return str(raised.value).splitlines()[1:]


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
