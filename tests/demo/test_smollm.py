"""The real model's demo: its text is made of the catalogues in wheels, and its options exist."""

import re
import runpy
import struct
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from llamapro.inference import sampling
from llamapro.text import streaming
from llamapro.training.checks import check
from llamapro.training.preset import parse


def catalogue(messages: dict[str, str]) -> bytes:
    """A `.mo` file: a header, two tables of lengths and offsets, and strings that end in 0."""
    pairs = sorted((key.encode(), text.encode()) for key, text in messages.items())
    at, tables, strings = 28 + 16 * len(pairs), [b"", b""], b""
    for column in (0, 1):
        for pair in pairs:
            tables[column] += struct.pack("<2I", len(pair[column]), at + len(strings))
            strings += pair[column] + b"\0"
    header = struct.pack("<7I", 0x950412DE, 0, len(pairs), 28, 28 + 8 * len(pairs), 0, 0)
    return header + tables[0] + tables[1] + strings


@pytest.mark.parametrize(("language", "other"), [("German", "fi"), ("Finnish", "de")])
def test_pairs_become_training_and_held_out_text(
    language: str,
    other: str,
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One language, each message once; plurals and what both languages share are left out."""
    messages = {f"Delete item {i}": f"Element {i} löschen" for i in range(400)}
    messages |= {"": "Content-Type: text/plain; charset=UTF-8\n", "OK": "OK"}
    messages |= {"verb\x04Open": "Öffnen", "%d file\0%d files": "%d Datei\0%d Dateien"}
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as wheel:
        for locale in ("de", "fi"):
            known = catalogue(messages if locale != other else {"": "", "No": "Non"})
            wheel.writestr(f"a/locale/{locale}/LC_MESSAGES/django.mo", known)
    script = str(root / "demo" / "smollm_corpus.py")
    argv = [script, str(tmp_path / "out"), str(tmp_path / "a.whl")]
    argv += ["--language", language] if language != "German" else []
    monkeypatch.setattr(sys, "argv", argv)
    runpy.run_path(script, run_name="__main__")
    assert "401 pairs" in capsys.readouterr().out
    corpus = tmp_path / "out" / "corpus"
    text = {
        name: "\n".join(file.read_text() for file in sorted((corpus / name).iterdir()))
        for name in ("train", "val")
    }
    pair = rf"English: (.+)\n{language}: (.+)"
    pairs = {name: re.findall(pair, part) for name, part in text.items()}
    assert len(pairs["train"]) + len(pairs["val"]) == 401 and 10 < len(pairs["val"]) < 30
    assert not {m for m, _ in pairs["train"]} & {m for m, _ in pairs["val"]}
    assert ("Open", "Öffnen") in pairs["train"] + pairs["val"] and "Non" not in text["train"]


def test_its_preset_can_run() -> None:
    """For the directories that the script makes."""
    settings = parse(["--config", "smollm"])
    check(settings, 1)
    script = (Path(__file__).parents[2] / "demo" / "smollm.sh").read_text()
    assert settings.model.path == "smollm-out/expanded" and "$out/expanded" in script
    assert (
        settings.run_dir == "smollm-out/runs/pro" and "merge $out/expanded $out/runs/pro" in script
    )


def test_labels_are_short_and_of_common_words(root: Path) -> None:
    """A word that few short messages have is not learned in minutes; placeholders never are."""
    select = runpy.run_path(str(root / "demo" / "smollm_corpus.py"))["select_labels"]
    common = [(f"Delete {noun}", f"{noun} löschen") for noun in "abcdefghij"]
    common += [(f"{noun} delete", "löschen") for noun in "abcdefghij" for _ in range(9)]
    rare = [("Delete xylophone", "Xylophon löschen"), ("Delete %s", "%s löschen")]
    long = [("Delete a b c d e f g h i j a b c d", "löschen")]
    assert sorted(select([*common, *rare, *long])) == sorted(common)


def test_the_table_counts_what_is_right_word_for_word(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first line that a model writes is its translation."""
    (tmp_path / "val").mkdir()
    pairs = {f"Word {i}": f"Wort {i}" for i in range(12)}
    text = "\n\n".join(f"English: {english}\nGerman: {german}" for english, german in pairs.items())
    (tmp_path / "val" / "00000.txt").write_text(text)
    known = {"base": {"Word 3": "Wort 3"}, "pro": pairs | {"Word 5": "Wort"}}

    def write(model: str, _: object, prompt: str, tokens: int) -> Iterator[tuple[None, str]]:
        message = prompt.removeprefix("English: ").removesuffix("\nGerman:")
        yield from ((None, piece) for piece in (" ", known[model].get(message, "no"), "\n\nE"))
        raise AssertionError("it goes on after the line")

    monkeypatch.setattr("llamapro.load", lambda directory: directory.name)
    monkeypatch.setattr(sampling, "write_text", write)
    monkeypatch.setattr(streaming, "StreamingDecoder", lambda *_: None)
    loaded = SimpleNamespace(encode_prompt=str)
    monkeypatch.setattr("llamapro.Tokenizer", SimpleNamespace(load=lambda _: loaded))
    script = str(root / "demo" / "smollm_labels.py")
    monkeypatch.setattr(sys, "argv", [script, "base", "pro", str(tmp_path / "val")])
    runpy.run_path(script, run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert "| Word 3 | Wort 3 | Wort 3 | Wort 3 |" in lines and len(lines) == 14
    assert lines[-1] == "right, of 12 held-out messages: 1 before, 11 after"
