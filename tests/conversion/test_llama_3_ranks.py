"""A directory with Llama 3's ranks is read by transformers and by us, and carried along."""

import base64
import inspect
import json
import shutil
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llamapro.checkpoints.directory import Checkpoint
from llamapro.conversion.companions import write_companions
from llamapro.conversion.expand import expand_checkpoint
from llamapro.conversion.merge import assemble_checkpoint, merge_checkpoint
from llamapro.errors import DataError
from llamapro.expansion import insert_after
from llamapro.text.tokenizer import Tokenizer

transformers = pytest.importorskip("transformers", reason="pip install -e '.[hf]'")


def small_ranks() -> bytes:
    """BPE ranks whose longer tokens repeat, overlap, and end where others begin."""
    tokens = [bytes([byte]) for byte in range(256)]
    words = (" the", "the", " return", "self", "ing", "        ", "\n\n\n", "1234", "Grü", "世界")
    for word in (*words, "aaaaa"):
        whole = word.encode()
        tokens += [whole[:end] for end in range(2, len(whole) + 1)]
    tokens += [b"urn", b"tu", b"el", b"lf", b"\xbc\xc3"]  # no merges of lower ones lead to "urn"
    return b"".join(
        base64.b64encode(token) + b" %d\n" % rank
        for rank, token in enumerate(dict.fromkeys(tokens))
    )


@pytest.fixture(scope="module")
def small_llama_3(
    tmp_path_factory: pytest.TempPathFactory, tiny_config: Callable[..., Any]
) -> Path:
    """A directory written from small BPE ranks alone."""
    home = tmp_path_factory.mktemp("small")
    (home / "tokenizer.model").write_bytes(small_ranks())
    (home / "out").mkdir()
    write_companions(home / "out", tiny_config(), [home / "tokenizer.model"])
    return home / "out"


@pytest.fixture(params=["small", "real"])
def llama_3(
    request: pytest.FixtureRequest,
    small_llama_3: Path,
    tmp_path: Path,
    tiny_config: Callable[..., Any],
    shared: Path,
) -> Path:
    """The same, and one of Llama 3's own ranks where they are."""
    if request.param == "small":
        return small_llama_3
    file = shared / "tokenizers" / "llama-3" / "tokenizer.model"
    if not file.exists():
        pytest.skip(f"needs {file}; the small one of its kind is tested")
    write_companions(tmp_path, tiny_config(), [file])
    assert (tmp_path / "original" / "tokenizer.model").read_bytes() == file.read_bytes()
    return tmp_path


def test_auto_tokenizer_gives_tiktokens_ids_with_llama_3s_ranks(
    llama_3: Path, texts: list[str]
) -> None:
    """BOS first, of its own name, and the context; the texts come back."""
    theirs = transformers.AutoTokenizer.from_pretrained(llama_3, local_files_only=True)
    ours = Tokenizer.load(llama_3 / "original" / "tokenizer.model")
    assert (theirs.bos_token, theirs.eos_token) == ("<|begin_of_text|>", "<|end_of_text|>")
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos_id, ours.eos_id)
    assert (theirs.model_max_length, len(theirs)) == (512, ours.vocab_size)
    assert theirs.convert_tokens_to_ids(list(ours.special_tokens)) == list(
        ours.special_tokens.values()
    )
    blanks = ["\n" * 300, " " * 300 + "x", "a" * 301, "12345678 1", "urn (urn)"]
    blanks.append(inspect.getsource(textwrap))
    for text in [*texts, *blanks]:
        ids = ours.encode(text)
        assert theirs.encode(text, add_special_tokens=False) == ids
        assert theirs.encode(text) == [ours.bos_id, *ids]
        assert theirs.decode(ids) == ours.decode(ids)
    named = "a<|eot_id|>\n\nb <|begin_of_text|>"
    assert theirs.encode(named, add_special_tokens=False) == ours.encode(named, special=True)


def test_llama_3s_directory_is_read_by_its_ranks(
    small_llama_3: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No tokenizers library is needed; the fingerprint is that of the release's own file."""
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    ours = Tokenizer.load(small_llama_3)
    alone = Tokenizer.load(small_llama_3 / "original" / "tokenizer.model")
    assert ours.path == alone.path and ours.fingerprint == alone.fingerprint
    assert {file.name for file in ours.files} >= {"tokenizer.json", "tokenizer_config.json"}


def test_a_directory_of_ranks_and_another_tokenizer_json_is_refused(
    small_llama_3: Path, tmp_path: Path
) -> None:
    """The two files of a directory must have one vocabulary."""
    shutil.copytree(small_llama_3, tmp_path / "copy")
    raw = json.loads((tmp_path / "copy" / "tokenizer.json").read_text())
    vocab = raw["model"]["vocab"]
    vocab["A"], vocab["B"] = vocab["B"], vocab["A"]
    (tmp_path / "copy" / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(DataError, match=r"tokenizer\.json are of different vocabularies"):
        Tokenizer.load(tmp_path / "copy")


def test_expand_merge_and_assemble_carry_llama_3s_ranks_along(
    small_llama_3: Path,
    tmp_path: Path,
    tiny_config: Callable[..., Any],
    write_random_checkpoint: Callable[..., Path],
    write_trained: Callable[..., Path],
) -> None:
    """They go into `original` again; they and the files made of them keep their bytes."""
    base = write_random_checkpoint(tmp_path / "base", tiny_config())
    (base / "tokenizer.model").unlink()
    shutil.copytree(small_llama_3, base, dirs_exist_ok=True)
    names = ("original/tokenizer.model", "tokenizer.json", "tokenizer_config.json")
    expand_checkpoint(Checkpoint.open(base), tmp_path / "pro", insert_after(4, [1]))
    pro = Checkpoint.open(tmp_path / "pro")
    blocks = write_trained(tmp_path / "trainable.safetensors", pro, trainable="all")
    merge_checkpoint(pro, blocks, tmp_path / "merged")
    state = {"step": 1, "settings": {"model.tokenizer": str(base)}}
    (tmp_path / "state.json").write_text(json.dumps(state))
    assemble_checkpoint(pro.path / "config.json", blocks, tmp_path / "assembled")
    for result in ("pro", "merged", "assembled"):
        assert not (tmp_path / result / "tokenizer.model").exists()
        for name in names:
            assert (tmp_path / result / name).read_bytes() == (small_llama_3 / name).read_bytes()
