"""Ids to text as a stream: a token may end inside a character."""

import codecs
from collections.abc import Iterable

from llamapro.text.tokenizer import Tokenizer


class StreamingDecoder:
    """Turns ids into text one at a time, as they are generated.

    The texts of the prompt, of `feed` and of `flush` are together `tokenizer.decode` of all ids,
    although a token may end inside a character.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Iterable[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._strips_space = tokenizer.adds_space  # before the very first text
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for token_id in prompt_ids:
            self.feed(token_id)

    def feed(self, token_id: int) -> str:
        """Takes the next id; returns the text that became final, often "" inside a character."""
        piece = self._tokenizer.bytes_of(int(token_id))
        if piece and self._strips_space:
            piece, self._strips_space = piece.removeprefix(b" "), False
        return self._decoder.decode(piece)

    def flush(self) -> str:
        """Returns what is left at the end: U+FFFD for a broken character."""
        return self._decoder.decode(b"", final=True)
