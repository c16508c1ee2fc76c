"""A turn as a row of a file holds it -> a message: role, content, and whether it is trained."""

import json
import re
from typing import Any

from llamapro.text.messages import OBJECT, PARTS, REASONING, ROLES, Message, parsed, says_more
from llamapro.text.rows import quote_names

NAMED_ROLES = {"human": "user", "observation": "tool", "tool_response": "tool"}
NAMED_ROLES |= dict.fromkeys("gpt chatgpt model bot function_call tool_call".split(), "assistant")
_CALLS = ("function_call", "tool_call")  # LLaMA-Factory's and ms-swift's: the content is the call
_TEXTS = {"text", "input_text", "output_text"}  # types of parts of a content
FOREIGN = ("image", "images", "audio", "audios", "video", "videos")  # these would be lost
# Keys of a turn that say whether it is trained: by 1, and by 0. Others of such names are refused.
SWITCHES = (*"weight loss_weight loss_mask train_mask train training trainable loss".split(),)
MASKS = ("masked", "is_masked")
_WORDS = "train(ed|ing|able)?|learn|loss(es)?|mask(s|ed)?|weights?|ignored?|excluded?"
SAYS_TRAINED = re.compile(f"(?<!attention)(^|_)({_WORDS})(_|$)")
SAYS_UNTRAINED = re.compile("mask|ignore|exclude|(^|_)no_|on_(input|prompt|source|user)|detail")


def is_call(turn: dict[str, Any]) -> bool:
    """Whether the content of a turn is a call of a tool, as its role says."""
    return turn.get("role", turn.get("from")) in _CALLS


def to_message(turn: Any, place: str) -> Message:
    """Returns a turn with role, content, its other keys and, if it has one, its weight.

    Raises ValueError if there is no role, more than text, or a weight that cannot be honoured.
    """
    if not isinstance(turn, dict):
        raise ValueError(f"{place}: expected role and content, found {type(turn).__name__}")
    role, content = turn.get("role"), turn.get("content")
    for one, other in (("role", "from"), ("content", "value"), ("content", "text")):
        a, b = (NAMED_ROLES.get(str(v).lower(), v) for v in map(turn.get, (one, other)))
        if None not in (a, b) and a != b and (one == "content" or b in ROLES):
            raise ValueError(f"{place}: {other!r} says something else than {one!r}: keep one")
    if role is None and "from" in turn:
        role, content = turn["from"], turn.get("value", content)
    if content is None:
        content = turn.get("value", turn.get("text"))
    if is_call(turn):
        calls = parsed(f"{place}: the call", content)
        calls = calls if isinstance(calls, list) else [calls]
        if not all(isinstance(call, dict) and call.get("name") for call in calls):
            raise ValueError(f"{place}: expected a call's name and arguments, not {content!r:.80}")
        turn = turn | {"tool_calls": [{"type": "function", "function": call} for call in calls]}
        content = ""
    role = NAMED_ROLES.get(str(role).lower(), role)
    if role is None:
        found = quote_names(turn)
        raise ValueError(f"{place}: no role and content, or from and value (found keys: {found})")
    for key in FOREIGN:
        if turn.get(key):
            raise ValueError(f"{place}: has {key!r}: only text is trained on")
    if isinstance(content, list):
        parts = [p if isinstance(p, dict) else {"type": type(p).__name__} for p in content]
        if kinds := {str(part.get("type")) for part in parts} - _TEXTS:
            names = ", ".join(sorted(kinds))
            raise ValueError(f"{place}: a part of type {names}; only text is trained on")
        keys = (key for part in parts for key, value in part.items() if value is not None)
        if weights := [*filter(SAYS_TRAINED.search, keys)]:
            raise ValueError(f"{place}: a part of the content has {weights[0]!r}: cut the turn")
        if not all(isinstance(part.get("text"), str) for part in parts):
            raise ValueError(f"{place}: the content has a part of type text without a text")
        turn = turn | {PARTS: [part["text"] for part in parts]}
        content = "".join(turn[PARTS])
    if isinstance(content, dict) and role in ("tool", "function", "ipython"):
        turn, content = turn | {OBJECT: content}, json.dumps(content, ensure_ascii=False)
    if call := turn.get("function_call"):  # OpenAI's older form of one call
        if turn.get("tool_calls"):
            raise ValueError(f"{place}: has 'function_call' and 'tool_calls': keep one")
        call = parsed(f"{place}: 'function_call'", call)
        turn = turn | {"tool_calls": [{"type": "function", "function": call}]}
    calls = parsed(f"{place}: 'tool_calls'", turn.get("tool_calls"))
    if calls and not (isinstance(calls, list) and all(isinstance(call, dict) for call in calls)):
        raise ValueError(f"{place}: 'tool_calls' is {calls!r:.80}, expected a list of calls")
    # Some templates take an empty list for a call, and an empty reasoning for one.
    turn = turn | {"tool_calls": calls or None} | {key: turn.get(key) or None for key in REASONING}
    if content is None and (says_more(turn) or ("content" in turn and role == "tool")):
        content = ""  # a tool may return nothing
    known = ("role", "content", "from", "value", "text", "function_call", *SWITCHES, *MASKS)
    others = {key: v for key, v in turn.items() if key not in known and v is not None}
    return {"role": role, "content": content} | others | _weight(turn, role, place)


def _weight(turn: dict[str, Any], role: str, place: str) -> dict[str, int]:
    """Returns {"weight": 0} for a turn that is not trained, {} for others.

    OpenAI says it by `weight`, axolotl by `train`, ms-swift by `loss`, torchtune by `masked`.
    """
    for key, value in turn.items():
        if key in (*SWITCHES, *MASKS) or not SAYS_TRAINED.search(key) or value is None:
            continue
        if value or not SAYS_UNTRAINED.search(key):
            raise ValueError(f"{place}: {key!r} is not read; cut the turn, or give it a weight")
    said = {key: turn[key] for key in (*SWITCHES, *MASKS) if turn.get(key) is not None}
    if wrong := [f"{key!r} is {value!r}" for key, value in said.items() if value not in (0, 1)]:
        raise ValueError(f"{place}: {wrong[0]}; only 0 and 1 are understood")
    said = {key: bool(value) == (key not in MASKS) for key, value in said.items()}
    if len(set(said.values())) > 1:
        raise ValueError(f"{place}: {' and '.join(map(repr, said))} contradict each other")
    if role != "assistant" and any(said[key] for key in said if key != "weight"):
        raise ValueError(f"{place}: only turns of the assistant are trained, this is of {role!r}")
    return {} if all(said.values()) else {"weight": 0}
