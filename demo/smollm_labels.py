"""Lets two models translate messages that neither was trained on, and counts the right ones.

    python demo/smollm_labels.py BASE_DIR PRO_DIR VAL_DIR

A translation is right if it is the program's own, word for word. Prints a table in Markdown.
"""

import argparse
import re
from pathlib import Path

from tqdm import tqdm

import llamapro
from llamapro.inference.sampling import write_text
from llamapro.text.streaming import StreamingDecoder

SHOWN = 10  # rows of the table
TOKENS = 16  # of the longest translation


def main() -> None:
    """Prints the first messages with both translations, and how many of all are right."""
    parser = argparse.ArgumentParser(description="Compares two models on held-out messages.")
    parser.add_argument("models", nargs=2, type=Path, metavar="MODEL_DIR")
    parser.add_argument("val", type=Path, metavar="VAL_DIR")
    args = parser.parse_args()
    text = "\n\n".join(file.read_text(encoding="utf-8") for file in sorted(args.val.iterdir()))
    pairs = re.findall(r"English: (.+)\nGerman: (.+)", text)
    written = [translate(model, [message for message, _ in pairs]) for model in args.models]
    print("| English | German | before | after |\n|---|---|---|---|")
    for pair, before, after in list(zip(pairs, *written, strict=True))[:SHOWN]:
        print("| " + " | ".join([*pair, before, after]).replace("\n", " ") + " |")
    right = [
        sum(german == answer for (_, german), answer in zip(pairs, answers, strict=True))
        for answers in written
    ]
    print(f"\nright, of {len(pairs)} held-out messages: {right[0]} before, {right[1]} after")


def translate(directory: Path, messages: list[str]) -> list[str]:
    """Returns the line that a model writes after each message and the word German."""
    model, tokenizer = llamapro.load(directory), llamapro.Tokenizer.load(directory)
    answers = []
    for message in tqdm(messages, desc=f"{directory.name} translates", disable=None):
        prompt, answer = tokenizer.encode_prompt(f"English: {message}\nGerman:"), ""
        for _, piece in write_text(model, StreamingDecoder(tokenizer, prompt), prompt, TOKENS):
            answer += piece
            if "\n" in answer.lstrip():
                break
        answers.append(answer.strip().partition("\n")[0].strip())
    return answers


if __name__ == "__main__":
    main()
