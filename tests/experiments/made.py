"""Studies whose numbers are made up, for the tests of what is said about them."""

from typing import Any

Study = dict[str, Any]


def trial(variant: str, seed: int, domain: float, general: float, **more: Any) -> dict[str, Any]:
    """A run that ends so far from a base of 4 (code) and 3 (english; packages moves twice that)."""
    ends = {"code": (4.0, domain), "english": (3.0, general), "packages": (3.0, 2 * general)}
    about = {"lr": 1e-3, "seed": seed, "chosen": True, "failed": None, "trainable": 1000}
    about |= {"total": 5000, "tokens_per_s": 100.0 * seed**2, "memory_bytes": 2**20 * seed}
    about |= {"train_s": 10.0, "replay_s": 0.0, "shift": None, "choices": None}
    curves = {
        name: [[0, base], [100, base + change / 2], [200, base + change]]
        for name, (base, change) in ends.items()
    }
    return {"variant": variant, "curves": curves, **about, **more}


def make(*variants: tuple[str, str, int | None], trials: list[dict[str, Any]]) -> Study:
    """A study of (name, group, new blocks)."""
    return {
        "name": "small-code",
        "base": "small",
        "domain": "code",
        "layers": 8,
        "general": ["english", "packages"],
        "domain_set": "code",
        "compared": "new-4",
        "base_result": {
            "losses": {"code": 4.0, "english": 3.0, "packages": 3.0},
            "choices": {"accuracy": 0.5, "chance": 0.25},
        },
        "variants": [
            {"name": name, "label": f"the {name}", "group": group, "new_blocks": blocks}
            | {"varies": "new-4" if group == "retention" else ""}
            for name, group, blocks in variants
        ],
        "step_ratios": {name: 1.0 for name, group, _ in variants if group == "retention"},
        "trials": trials,
    }


def results(*studies: Study) -> dict[str, Any]:
    about = {"machine": "a machine", "versions": {"torch": "2.x"}, "settings": {"steps": 7}}
    return {"about": about | {"elapsed_s": 61.0}, "studies": list(studies)}


def pair(name: str, group: str, ours: list[float], theirs: list[float], what: str) -> Study:
    """new-4 and another variant whose domain losses, or general changes, are these."""
    trials = []
    for variant, values in (("new-4", ours), (name, theirs)):
        for seed, value in enumerate(values, 1):
            domain, general = (value, 0.1) if what == "domain" else (-0.5, value)
            trials.append(trial(variant, seed, domain, general))
    return make(("new-4", "number", 4), (name, group, 4), trials=trials)


def line(text: str, start: str) -> str:
    """The first line of a page that begins so."""
    return next(row for row in text.splitlines() if row.lstrip("-| ").startswith(start))
