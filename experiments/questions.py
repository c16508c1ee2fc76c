"""Makes multiple-choice questions about the world's countries, from the wheel of `countryinfo`.

    python experiments/questions.py OUT.jsonl COUNTRYINFO_WHEEL

A small instruct model knows many of the answers, so what training destroys shows. The wrong choices
are the answers of other countries of the same region, where there are enough of them.
"""

import argparse
import json
import random
import zipfile
from pathlib import Path
from typing import Any

WRONG = 3
ASKED = {
    "The capital of {name} is": "capital",
    "{name} is a country in": "subregion",
    "A person from {name} is called": "demonym",
    "The internet addresses of {name} end with": "tld",
}


def read_countries(wheel: Path) -> list[dict[str, Any]]:
    """Returns the countries with everything that is asked, by name."""
    countries = {}
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.startswith("countryinfo/data/") and name.endswith(".json"):
                country = json.loads(archive.read(name))
                country["tld"] = (country.get("tld") or [None])[0]
                asked = [country.get(key) for key in ("region", *ASKED.values())]
                if all(isinstance(value, str) and value for value in asked):
                    countries[country["name"]] = country
    return [countries[name] for name in sorted(countries)]


def questions(countries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns all questions, in a fixed order."""
    draw, rows = random.Random(0), []
    for form, key in ASKED.items():
        for country in countries:
            right = country[key]
            near = {c[key] for c in countries if c["region"] == country["region"]} - {right}
            anywhere = {c[key] for c in countries} - {right}
            wrong = draw.sample(sorted(near if len(near) >= WRONG else anywhere), WRONG)
            choices = [right, *wrong]
            draw.shuffle(choices)
            context = form.format(name=country["name"])
            rows.append({"context": context, "choices": choices, "answer": choices.index(right)})
    return rows


def main() -> None:
    """Writes the questions."""
    parser = argparse.ArgumentParser(description="Makes questions about the world's countries.")
    parser.add_argument("out", type=Path)
    parser.add_argument("wheel", type=Path)
    args = parser.parse_args()
    rows = questions(read_countries(args.wheel))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"{args.out}: {len(rows):,} questions")


if __name__ == "__main__":
    main()
