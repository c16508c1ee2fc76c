"""Where the assistant's turns lie in the text that a chat template makes of a conversation.

Spans are the first byte and the last + 1, of the text without marks.
"""

import re
from collections.abc import Callable, Iterator, Sequence

from llamapro.errors import DataError
from llamapro.text.messages import PARTS, REASONING, RESERVED, Message, texts_of
from llamapro.text.sandbox import END, MARK, START

Span = tuple[int, int]
SPACE = "\u2581"  # sentencepiece's
_CONTENT = "\ue000"  # a private character
_BORDER = re.compile(f"([{START}{END}])")
_FIX = "put {% generation %} around the assistant's text in a template of your own"


class RewrittenError(DataError):
    """A template renders earlier turns differently once there are later ones."""


def trained_turns(messages: Sequence[Message]) -> Iterator[tuple[int, Message]]:
    """Yields the assistant's turns that have a weight, with their indices."""
    for index, message in enumerate(messages):
        if message["role"] == "assistant" and message.get("weight", 1):
            yield index, message


def without_borders(marked: str) -> str:
    """Returns a text without the marks around {% generation %}."""
    return _BORDER.sub("", marked)


def is_of(raw: bytes, extent: Span, span: Span) -> bool:
    """Whether a token of a text is of a turn: wholly, or but for white space around its words."""
    (start, end), (first, last) = extent, span
    if first <= start < last and end <= last:
        return True
    outside = raw[start : min(end, first)] + raw[max(start, last) : end]
    return not outside.strip() and bool(raw[max(start, first) : min(end, last)].strip())


def joined(spans: Sequence[Span]) -> list[Span]:
    """Returns spans as one where they touch, because a token may lie across their border."""
    found: list[Span] = []
    for start, end in spans:
        first = found.pop()[0] if found and found[-1][1] == start else start
        found.append((first, end))
    return found


def places_of(text: str, begin: int) -> list[int]:
    """Returns where each byte of a text, and its end, lies if U+2581 is one byte, a space."""
    places = [begin]
    for character in text:
        width = len(character.encode())
        if character == SPACE:
            places.append(places[-1] + width)
        else:
            places += range(places[-1] + 1, places[-1] + width + 1)
    return places


def tagged_spans(marked: str, messages: Sequence[Message], origin: str) -> list[Span]:
    """Returns the trained turns of the assistant: what {% generation %} encloses.

    Raises DataError if it encloses other turns than these, so that a weight cannot be honoured, or
    as `check_reasoning`.
    """
    check_reasoning(messages, RESERVED.sub("", marked), origin)
    spans, position, first = [], 0, 0
    for part in _BORDER.split(marked.replace(MARK, "")):
        if part == START:
            first = position
        elif part == END:
            spans.append((first, position))
        else:
            position += len(part.encode())
    weights = [m.get("weight", 1) for m in messages if m["role"] == "assistant"]
    if all(weights):
        return spans
    if len(spans) != len(weights):
        raise DataError(
            f"{origin}: has {len(spans)} {{% generation %}} for {len(weights)} turns of the "
            "assistant, so a turn's 'weight' cannot be honoured"
        )
    return [span for span, weight in zip(spans, weights, strict=True) if weight]


def added_spans(
    render: Callable[[Sequence[Message], bool], str],
    messages: Sequence[Message],
    eos: str,
    origin: str,
) -> list[Span]:
    """Returns the trained turns of the assistant: what each adds to the turns before it.

    Args:
        render: a conversation, and whether the prompt of an answer follows, to text.
        eos: the name of EOS, "" if there is none.
        origin: names the template in messages.

    Raises:
        RewrittenError: a turn is another one in the whole conversation.
        DataError: the template does not show where a turn begins, or leaves out its reasoning.
    """
    full = render(messages, False)
    spans = []
    for index, message in trained_turns(messages):
        place = f"{origin}: turn {index + 1}: the template"
        after = render(messages[: index + 1], False)
        # Some templates put EOS behind the last turn only.
        if ends_otherwise := not full.startswith(after):
            after = after.removesuffix(eos)
        if not full.startswith(after):
            raise RewrittenError(
                f"{place} renders earlier turns differently once there are later ones, so where "
                f"this one begins is unknown; {_FIX}"
            )
        if index == 0:  # nothing to render before it: its header ends where the content begins
            shown = render([{**message, "content": _CONTENT, PARTS: []}], False)
            before, found, _ = shown.partition(_CONTENT)
            if not (after.startswith(before) and found):
                raise DataError(f"{place} hides where it begins")
        else:
            before = render(messages[:index], True)
            if not after.startswith(before) and messages[index - 1]["role"] == "assistant":
                before = _behind_answer(render, messages[: index + 1], before)
            if not after.startswith(before):
                raise DataError(
                    f"{place} writes {before[-40:]!r} before an answer, and not before this one, "
                    f"so where this one begins is unknown; {_FIX}"
                )
        added = after[len(before) :]
        check_reasoning(messages[: index + 1], added, origin, first=index)
        header, tail = "", added  # without content, as beside a call, a header is in the tail
        for number, content in enumerate(filter(None, map(str.strip, texts_of(message)))):
            before_it, _, tail = tail.partition(content)
            header = header if number else before_it
        if ends_otherwise and not tail.strip():
            raise RewrittenError(f"{place} ends it with {eos!r} only while it is the last; {_FIX}")
        # Llama 2's and Mistral's templates ignore the prompt too, but have no header; Llama 3's
        # first template puts the next header behind every answer.
        prior = messages[: index or 1]
        prompt = before if index else render(prior, True)
        ignores_prompt = prompt == render(prior, False)
        if ignores_prompt and (header.strip() or "assistant" in tail.lower()):
            raise DataError(
                f"{place} ignores add_generation_prompt, so a header would be trained, in "
                f"{added[:80]!r}; {_FIX}"
            )
        if eos and full[len(after) :].startswith(eos) and not after.endswith(eos):
            after += eos  # other templates put it behind all turns but the last
        spans.append((len(before.encode()), len(after.encode())))
    return spans


def _behind_answer(
    render: Callable[[Sequence[Message], bool], str], messages: Sequence[Message], before: str
) -> str:
    """Returns what stands before the second of two answers, of which it changes the first.

    It ends with the prompt of an answer; `before`, where the first is not changed, if it does not.
    """
    *prior, last = messages
    prompt, earlier = before.removeprefix(render(prior, False)), texts_of(prior[-1])[-1].strip()
    shown = render([*prior, {**last, "content": _CONTENT, PARTS: []}], False)
    head, _, rest = shown.partition(_CONTENT)[0].rpartition(prompt)
    # Gemma 4's has no prompt between the two: the last one is that of the first answer.
    return before if earlier in rest or not prompt.strip() else head + prompt


def check_reasoning(messages: Sequence[Message], text: str, origin: str, first: int = 0) -> None:
    """Raises DataError if the text lacks the reasoning of a trained turn from `first` on.

    It is RewrittenError if the turn is not the last: then it may have been there before.
    """
    text = " ".join(text.split())
    for index, message in trained_turns(messages):
        reasoning = " ".join(reasoning_of(message).split())
        if index >= first and reasoning not in text:
            kind = DataError if index == len(messages) - 1 else RewrittenError
            raise kind(
                f"{origin}: turn {index + 1}: the template leaves out its reasoning, "
                f"{reasoning[:40]!r}: it would not be trained; remove it, or use a template that "
                "shows it"
            )


def reasoning_of(message: Message) -> str:
    """Returns the reasoning that a turn holds, in a key of its own or before "</think>"."""
    said = next((message[key] for key in REASONING if message.get(key)), None)
    if said is None:
        said = message["content"].rpartition("</think>")[0].rpartition("<think>")[2]
    return str(said).strip()
