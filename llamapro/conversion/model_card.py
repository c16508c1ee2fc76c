"""The model card of a merged model, or of a new-block file: licence, base, use, data, losses.

Its sources are the checkpoint's record and the `state.json` beside each new-block file. For a
new-block file that came alone, the card only lists its blocks. Only the last part of a data path is
shown, because a card is published.
"""

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamapro.checkpoints.hub import BASE_CARD_FILE
from llamapro.checkpoints.new_blocks import BlocksInfo, NewBlocks
from llamapro.checkpoints.run import MAX_STATE_BYTES, STATE_FILE, TRAINABLE_FILE
from llamapro.config import ModelConfig
from llamapro.errors import CheckpointError, note
from llamapro.files import read_json
from llamapro.formatting import perplexity
from llamapro.text.template_files import own_template

CARD_FILE = "README.md"
SETTINGS = (
    "data.weights data.seq_len train.trainable train.batch_size train.dtype train.seed optim.lr "
    "optim.final_lr_ratio optim.warmup_ratio optim.betas optim.weight_decay optim.clip"
).split()
NAME = "OWNER/NAME"  # stands for the repository until the card is published
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)
# The front matter, and in it a field as its author wrote it: in quotes, before a comment, or as a
# list, which has lines of its own.
_FRONT = re.compile(r"\s*---\n((?:.*\n)*?)---[ \t]*(?:\n|\Z)")
_LICENCE = re.compile(r"^license(?:_name|_link)?:.*\n(?:[ -].*\n)*", re.MULTILINE)
# What is taken for one: a word, a text in quotes, or a list of these. YAML reads other things in
# some words: `no` is false.
_OTHER = r"(?i:yes|no|on|off|true|false|null|[\d._:+-]+)(?![\w.:/+-])"
_WORD = rf"""(?:(?!{_OTHER})[\w.:/+-]+|"[\w.:/+() -]*"|'[\w.:/+() -]*')(?: +#.*)?"""
_ITEMS = rf" *\[ *{_WORD}(?: *, *{_WORD})* *\]|(?: *\n *- +{_WORD})+"
_SOUND = re.compile(rf"\w+:(?: +{_WORD}|{_ITEMS})")
_USE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("OWNER/NAME")
model = AutoModelForCausalLM.from_pretrained("OWNER/NAME")
inputs = {inputs}
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))
```"""
_TEXT = 'tokenizer("Once upon a time", return_tensors="pt")'
_CHAT = """tokenizer.apply_chat_template(
    [{"role": "user", "content": "Hello!"}],
    add_generation_prompt=True, return_tensors="pt", return_dict=True,
)"""
_STRIP = (
    "- `llamapro verify` shows that they are inside, unchanged; `llamapro strip` takes the new "
    "blocks out again"
)
_USE_BLOCKS = """```
llamapro generate {base} --blocks hf://OWNER/NAME --prompt "Once upon a time"
llamapro merge {base} hf://OWNER/NAME OUT_DIR
```"""


@dataclass(frozen=True)
class Training:
    """The story of one new-block file: its metadata, and `state.json` beside it, empty if alone."""

    info: BlocksInfo
    state: dict[str, Any]

    @classmethod
    def of(cls, blocks: NewBlocks) -> "Training":
        """Reads the state beside a new-block file; a damaged one is reported and left out."""
        file = blocks.file
        path, state = file.parent / STATE_FILE, dict[str, Any]()
        if file.name == TRAINABLE_FILE and path.exists():
            try:
                state = read_json(path, MAX_STATE_BYTES)
            except CheckpointError as error:
                # The weights are checked elsewhere and are worth merging without their story.
                note(f"{error}; left out of the model card")
        if "chat_template" not in state and (found := own_template(file.parent)):
            state["chat_template"] = found  # of a published file, whose state stays at home
        return cls(blocks.info, state)

    def part(self, name: str) -> dict[str, Any]:
        """Returns a JSON object inside the state, empty if there is none."""
        found = self.state.get(name)
        return found if isinstance(found, dict) else {}

    @property
    def template(self) -> str | None:
        """The source of the chat template it was trained with, if it was."""
        found = self.state.get("chat_template")
        return found if isinstance(found, str) else None

    @property
    def tokenizer(self) -> str | None:
        """The fingerprint of the tokenizer it was trained with, if the state has it."""
        found = self.part("identity").get("tokenizer")
        return found if isinstance(found, str) else None


def render(
    title: str,
    config: ModelConfig,
    trainings: Sequence[Training],
    beside: Path,
    is_blocks: bool = False,
) -> str:
    """Returns the card: Hugging Face's front matter, then a short page in Markdown.

    Args:
        config: of the whole model; its record has the new blocks.
        trainings: one for each new-block file, in the order they were given.
        beside: the directory of the model, whose licence and chat template are named.
        is_blocks: whether the card is of a new-block file, and not of the whole model.
    """
    record, name = config.expansion, str(config.raw.get("_name_or_path", ""))
    # A local directory looks like a name on the hub, too.
    base = name if _HUB_NAME.fullmatch(name) and not os.path.exists(name) else None
    front = [f"library_name: {'llamapro' if is_blocks else 'transformers'}"]
    front += ["pipeline_tag: text-generation", *licence(beside)]
    front += [f"base_model: {base}"] if base else []
    front += ["tags:", "- llamapro"]
    page = [f"# {_cell(title)}"]  # paragraphs
    template = trainings[0].template if is_blocks else own_template(beside)
    use = _USE.replace("{inputs}", _CHAT if template else _TEXT)
    if record is None:
        page.append("All weights of this model were trained; none of a base is left as it was.")
    else:
        count = len(record.new_layers)
        frozen, held = config.num_hidden_layers - count, "between them and trained alone"
        what = f"A base of {frozen} frozen blocks and {count} new ones, put {held}"
        if is_blocks:
            what = f"{count} new blocks for a base of {frozen} frozen ones, put {held}"
            use = _USE_BLOCKS.replace("{base}", f"hf://{base}" if base else "BASE_DIR")
        page.append(f"{what} (LLaMA Pro, arXiv:2401.02415).")
    page += ["## Use", use]
    if template:
        what = "The blocks were trained with" if is_blocks else "Conversations take"
        page.append(f"{what} the chat template that lies beside this page.")
    if record is not None:
        facts = [f"- model: {base}"] if base else []
        facts.append(f"- sha256 of its tensors: `{_cell(record.base_sha256)}`")
        facts += [] if is_blocks else [_STRIP]
        copies = zip(record.new_layers, record.source_layers, strict=True)
        layers = _table(("layer", "copied from layer of the base"), copies)
        page += ["## Base", "\n".join(facts), "## New blocks", layers]
    if (beside / BASE_CARD_FILE).exists() and not is_blocks:
        page.append(f"The base's own model card, with its licence, is `{BASE_CARD_FILE}`.")
    for number, training in enumerate(trainings, 1):
        which = f" of new-block file {number}" if len(trainings) > 1 else ""
        page += [f"## Training{which}", *_training(training)]
    if len(trainings) > 1:
        page.append(
            "Each file was trained and measured on the base alone. What the blocks do together was "
            "not measured here; measure it with `llamapro evaluate`."
        )
    return "\n".join(["---", *front, "---", "", "\n\n".join(page), ""])


def front_matter(card: str) -> tuple[str, list[str], str]:
    """Splits a card into its front matter without a licence, the licence, and the page below."""
    found = _FRONT.match(card)
    front, page = (found[1], card[found.end() :]) if found else ("", card)
    fields = [field.rstrip() for field in _LICENCE.findall(front)]
    return _LICENCE.sub("", front), [field for field in fields if _SOUND.fullmatch(field)], page


def licence(directory: Path) -> list[str]:
    """Returns the fields of front matter that name a model's licence: its base's, or its file."""
    for name in (CARD_FILE, BASE_CARD_FILE):
        if (directory / name).is_file() and (found := front_matter(read_card(directory / name))[1]):
            return found
    files = sorted(file.name for file in directory.glob("LICENSE*"))
    return ["license: other", f"license_link: {files[0]}"] if files else []


def read_card(file: Path) -> str:
    """Returns the text of a card, whatever its ends of lines and with or without a byte mark."""
    return file.read_text("utf-8-sig", "replace")


def _training(training: Training) -> list[str]:
    """Returns the steps, data, settings and losses of one new-block file, as paragraphs."""
    state, settings = training.state, training.part("settings")
    steps = f"{training.info.step:,} optimizer steps"
    tokens = state.get("tokens")
    page = [steps + (f" on {tokens:,} tokens." if type(tokens) is int else ".")]
    rows: list[tuple[Any, ...]] = []
    data = training.part("identity").get("data")
    for label, found in data.items() if isinstance(data, dict) else ():
        kind, _, path = label.partition(" ")
        about = found if isinstance(found, dict) else {}
        # The last part alone, without the folders of a user; or the name of a validation set.
        source = path.rstrip("/").rpartition("/")[2]
        rows.append((kind, source, about.get("tokens"), str(about.get("sha256"))[:16]))
    if rows:
        page.append(_table(("data", "source", "tokens", "sha256"), rows))
    if rows := [(key, settings[key]) for key in SETTINGS if key in settings]:
        page.append(_table(("setting", "value"), rows))
    # `eval` holds the latest evaluation, which may have been before the training checkpoint.
    if evaluated := state.get("evaluated"):
        rows, initial = [], _numbers(training.part("base_eval"))
        for name, after in _numbers(training.part("eval")).items():
            before = initial.get(name)
            change = None if before is None else f"{after - before:+.3f}"
            rows.append((name, _loss(before), _loss(after), change))
        head = ("validation set", "before training", f"after step {_cell(evaluated)}", "change")
        if rows:
            page += ["Loss in nats per token (perplexity):", _table(head, rows)]
    return page


def _numbers(found: dict[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in found.items() if type(value) in (int, float)}


def _loss(loss: float | None) -> str | None:
    return None if loss is None else f"{loss:.3f} ({perplexity(loss):.2f})"


def _cell(value: Any) -> str:
    """Returns text for one cell or line; text of a file cannot become Markdown."""
    shown = "-" if value is None else f"{value:,}" if type(value) is int else str(value)
    return re.sub(r"([\\`*<>|\[\]#])", r"\\\1", " ".join(shown.split()))[:200]


def _table(head: tuple[str, ...], rows: Iterable[tuple[Any, ...]]) -> str:
    cells = [head, ["---"] * len(head), *([_cell(value) for value in row] for row in rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)
