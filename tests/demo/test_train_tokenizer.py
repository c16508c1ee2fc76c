"""Training a tokenizer: the same text gives the same bytes, and the command writes them once."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from llamapro.errors import DataError
from llamapro.text.tokenizer import Tokenizer

Train = Callable[[Iterable[str], int], bytes]


def test_training_is_deterministic_and_of_the_size_asked(
    tmp_path: Path, train_tokenizer: Train
) -> None:
    """The same text gives the same bytes, with Llama 2's special tokens."""
    text = Path(__file__).read_text(encoding="utf-8")
    model = train_tokenizer([text], 400)
    assert train_tokenizer([text], 400) == model
    (tmp_path / "tokenizer.model").write_bytes(model)
    trained = Tokenizer.load(tmp_path)
    assert (trained.vocab_size, trained.bos_id, trained.eos_id) == (400, 1, 2)


def test_training_drops_no_long_lines(tmp_path: Path, train_tokenizer: Train) -> None:
    """Lines longer than sentencepiece's limits, or with U+2585, shape the vocabulary too."""
    file = tmp_path / "tokenizer.model"
    file.write_bytes(
        train_tokenizer(["ox " * 60_000 + "zebra" * 60_000, "\u2585 giraffe" * 20], 285)
    )
    tokenizer = Tokenizer.load(file)
    assert len(tokenizer.encode("zebra" * 100)) < 200
    assert len(tokenizer.encode("giraffe")) < 7


@pytest.mark.parametrize(
    ("texts", "size"), [([], 300), (["\n\n"], 300), (["abc"], 9), (["a"], 999)]
)
def test_impossible_training_is_refused(
    train_tokenizer: Train, texts: list[str], size: int
) -> None:
    """No text, or a vocabulary too small or too large for it, is told in one message."""
    with pytest.raises(DataError, match=r"no text|too high|smaller"):
        train_tokenizer(texts, size)


def test_command_writes_a_tokenizer_once(tmp_path: Path, root: Path) -> None:
    """The command writes, prints one JSON object, and refuses to replace without --force."""
    script = str(root / "demo" / "train_tokenizer.py")
    words = [sys.executable, script, __file__, "--vocab-size", "400"]
    words += ["--out", str(tmp_path / "new"), "--json"]
    first = subprocess.run(words, capture_output=True, text=True, check=True)
    result = json.loads(first.stdout)
    assert (result["vocab_size"], result["documents"]) == (400, 1)
    assert [f.name for f in (tmp_path / "new").iterdir()] == ["tokenizer.model"]
    assert Tokenizer.load(tmp_path / "new").fingerprint == result["fingerprint"]
    second = subprocess.run(words, capture_output=True, text=True, check=False)
    assert second.returncode == 2 and "--force" in second.stderr and not second.stdout
    assert subprocess.run([*words, "--force"], capture_output=True, check=False).returncode == 0
