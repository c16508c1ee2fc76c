"""experiments/summary.py, findings.py, pictures.py: the study's numbers, verdicts and pictures."""

import copy
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import findings
import pictures
import pytest
import summary

MADE = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("made.py"))))
Study = dict[str, Any]
line, make, pair, results, trial = MADE.line, MADE.make, MADE.pair, MADE.results, MADE.trial


# ---- One row a variant --------------------------------------------------------------------------


def test_a_row_is_the_mean_and_spread_of_the_chosen_runs() -> None:
    """By hand: of 1, 2 and 3 the mean is 2 and the deviation 1, n - 1 in its denominator."""
    shift = {"unshifted": 0.8, "marginal": 0.15, "shifted": 0.05, "positions": 64}
    runs = [trial("new-4", seed, -0.1 * seed, 0.2 * seed, shift=shift) for seed in (1, 2, 3)]
    runs[0]["choices"], runs[1]["choices"] = {"accuracy": 0.25}, {"accuracy": 0.75}
    runs[2]["replay_s"] = 3.0
    others = [trial("new-4", 1, -9.0, 9.0, lr=3e-4, chosen=False)]
    others.append({"variant": "new-4", "lr": 3e-3, "seed": 1, "chosen": False, "failed": "inf"})
    (row,) = summary.summarize(make(("new-4", "number", 4), trials=[*others, *runs]))
    assert row["runs"] == 3 and row["failed"] == 1 and row["lr"] == 1e-3 and row["tried"] == 3
    assert tuple(row["domain_change"]) == pytest.approx((-0.2, 0.1, 3))
    assert tuple(row["domain"]) == pytest.approx((3.8, 0.1, 3))
    assert tuple(row["sets"]["english"]) == pytest.approx((0.4, 0.2, 3))
    assert tuple(row["sets"]["packages"]) == pytest.approx((0.8, 0.4, 3))
    assert tuple(row["general"]) == pytest.approx((0.6, 0.3, 3))
    assert tuple(row["accuracy"]) == pytest.approx((0.5, 0.125**0.5, 2))
    assert row["unshifted"].mean == pytest.approx(0.8) and row["trainable"] == 1000
    assert (row["tokens_per_s"], row["memory_bytes"]) == (400.0, 3 * 2**20)  # median, largest
    assert (row["train_s"], row["replay_s"]) == pytest.approx((10, 1))


def test_one_seed_has_no_spread() -> None:
    """None, not 0, and no ± in the page."""
    study = make(("new-4", "number", 4), trials=[trial("new-4", 1, -0.1, 0.2)])
    (row,) = summary.summarize(study)
    assert row["domain"].sd is None and row["domain"].error is None
    assert "3.900 (-0.100)" in line(summary.tables(results(study)), "the new-4")


@pytest.mark.parametrize(
    ("chosen", "said"), [(1e-3, "0.001"), (3e-3, "highest of 3"), (3e-4, "lowest of 3")]
)
def test_a_rate_at_the_end_of_those_tried_is_said(chosen: float, said: str) -> None:
    """A better one may lie beyond; a failed rate counts as tried."""
    runs = [trial("new-4", 1, 0, 0, lr=lr, chosen=lr == chosen) for lr in (3e-4, 1e-3, 3e-3)]
    study = make(("new-4", "number", 4), trials=runs)
    assert said in line(summary.tables(results(study)), "the new-4")
    text = findings.findings(results(study))
    assert ("a better one may lie beyond" in text) is ("of 3" in said)
    if chosen == 1e-3:
        runs[2] = {"variant": "new-4", "lr": 3e-3, "seed": 1, "chosen": False, "failed": "inf"}
        assert "of 3" not in line(summary.tables(results(study)), "the new-4")


# ---- The page -----------------------------------------------------------------------------------


def test_the_page_hides_no_trial() -> None:
    """The chosen, the others, the failed with their reason, and one whose loss was not finite."""
    runs = [trial("new-4", 1, -0.123, 0.1), trial("new-4", 2, -0.456, 0.1, chosen=False, lr=0.5)]
    runs.append({"variant": "new-4", "lr": 9.0, "seed": 3, "chosen": False, "failed": "too hot"})
    runs.append(trial("new-4", 4, 0, 0, lr=7.0))
    runs[-1]["curves"]["english"][-1][1] = None
    text = summary.tables(results(make(("new-4", "number", 4), trials=runs)))
    listed = text.split("## All trials: small-code")[1].split("## Settings")[0]
    rows = [r.replace(" ", "") for r in listed.splitlines() if r.startswith("| the new-4")]
    assert len(rows) == 4
    assert "|0.001|1|yes|" in rows[0] and "-0.123" in rows[0]
    assert "|0.5|2|no|" in rows[1] and "-0.456" in rows[1]
    assert "failed:toohot" in rows[2] and "failed:thelastlossisnotfinite" in rows[3]


def test_the_page_begins_with_the_base_and_keeps_the_order() -> None:
    """And ends with settings, machine and versions."""
    study = pair("aaa", "place", [-0.5, -0.6], [-0.1, -0.2], "domain")
    text = summary.tables(results(study))
    base = text.index("| base")
    assert base < text.index("| the new-4") < text.index("| the aaa")
    assert "4.000" in line(text, "base") and "50.0%" in line(text, "base")
    for part in ("a machine", "versions.torch", "2.x", "settings.steps", "1m01s"):
        assert part in text.split("## Settings")[1]


# ---- Verdicts -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ours", "theirs", "said"),
    [
        ([-0.50, -0.52], [-0.30, -0.32], "**holds**"),
        ([-0.30, -0.32], [-0.50, -0.52], "**does not hold**"),
        ([-0.50, -0.52], [-0.51, -0.53], "**no clear difference**"),
        ([-0.50, -0.50], [-0.50, -0.50], "**no clear difference**"),
        ([-0.50], [-0.30, -0.32], "**one seed, only the sign: as claimed**"),
        ([-0.30, -0.32], [-0.50], "**one seed, only the sign: opposite**"),
    ],
)
def test_a_verdict_is_of_two_standard_errors(
    ours: list[float], theirs: list[float], said: str
) -> None:
    """Of the difference of means; one seed has none."""
    text = findings.findings(results(pair("suffix", "place", ours, theirs, "domain")))
    sentence = line(text, "Interleaved new blocks learn more than stacked at the end")
    assert said in sentence and "60.98" in sentence


def test_two_standard_errors_are_the_border() -> None:
    """sd 1 of two seeds each: the difference's standard error is 1."""
    spread, verdict = summary.Spread, findings.verdict
    assert verdict(spread(0, 1, 2), spread(1.99, 1, 2)) == findings.EQUAL
    assert verdict(spread(0, 1, 2), spread(2.01, 1, 2)) == findings.HOLDS
    assert verdict(spread(2.01, 1, 2), spread(0, 1, 2)) == findings.FAILS


@pytest.mark.parametrize(
    ("name", "what", "ours", "theirs", "start"),
    [
        ("prefix", "domain", -0.5, -0.1, "Interleaved new blocks learn more than stacked at the f"),
        ("prefix", "general", 0.1, 0.9, "Stacked at the front"),
        ("full", "general", 0.1, 0.9, "New blocks forget less than full"),
        ("full", "domain", -0.5, -0.1, "New blocks learn more than full"),
        ("lora", "domain", -0.5, -0.1, "LoRA of as many parameters learns less"),
        ("lora", "general", 0.9, 0.1, "LoRA of as many parameters forgets less"),
        ("moe", "domain", -0.5, -0.1, "The MoE baseline learns less"),
        ("originals", "domain", -0.5, -0.1, "New blocks learn more than as many"),
        ("originals", "general", 0.1, 0.9, "New blocks forget less than as many"),
        ("copies", "domain", -0.5, -0.1, "Copies that are not zeroed learn less"),
        ("zero-norms", "domain", -0.5, -0.1, "Zero norms instead of zero outputs learn less"),
    ],
)
def test_each_claim_is_of_the_right_number_and_direction(
    name: str, what: str, ours: float, theirs: float, start: str
) -> None:
    """It holds for numbers in the paper's order, and not for the opposite ones."""
    mine, other = [ours, ours + 0.01], [theirs, theirs + 0.01]
    text = findings.findings(results(pair(name, "compared", mine, other, what)))
    assert "**holds**" in line(text, start)
    text = findings.findings(results(pair(name, "compared", other, mine, what)))
    assert "**does not hold**" in line(text, start)


def test_numbers_of_new_blocks_are_compared_with_their_neighbours() -> None:
    """In the order of the numbers, however the variants are listed."""
    changes = {"new-8": (8, -0.4), "new-1": (1, -0.2), "new-4": (4, -0.6)}
    runs = [
        trial(name, seed, change + 0.001 * seed, 0.1)
        for name, (_, change) in changes.items()
        for seed in (1, 2)
    ]
    variants = [(name, "number", blocks) for name, (blocks, _) in changes.items()]
    text = findings.findings(results(make(*variants, trials=runs)))
    sentence = line(text, "More new blocks learn more")
    first, second = sentence.split("; ")
    assert "**holds**" in first and "the new-4" in first and "the new-1" in first
    assert "**does not hold**" in second and "the new-8" in second


def test_what_is_missing_is_left_out_and_what_failed_is_said() -> None:
    """No claim is made of a variant without a finished run, nor of one that is not there."""
    study = pair("suffix", "place", [-0.5, -0.6], [], "domain")
    failed = {"variant": "suffix", "lr": 1e-3, "seed": 1, "chosen": False, "failed": "inf"}
    study["trials"].append(failed)
    text = findings.findings(results(study))
    sentence = line(text, "Interleaved new blocks learn more than stacked at the end")
    assert "`the suffix` has no finished run (1 failed)" in sentence and "**" not in sentence
    for other in ("full fine-tuning", "LoRA", "MoE", "Zero norms", "More new blocks", "meet"):
        assert f"- {other}" not in text
    assert "0 (1 failed)" in line(summary.tables(results(study)), "the suffix")
    empty = make(trials=[]) | {"compared": "new-4", "base_result": study["base_result"]}
    assert "small-code" in summary.tables(results(empty))
    assert "small-code" in findings.findings(results(empty))


# ---- Retention ----------------------------------------------------------------------------------


def kept(general: float, domain: float = -0.5, cost: float = 1.0, plain: float = 0.2) -> Study:
    """A retention option beside new-4, two alike seeds each; it reads a tenth more tokens."""
    runs = [trial("new-4", seed, -0.5, plain) for seed in (1, 2)]
    for seed in (1, 2):
        runs.append(trial("replay", seed, domain, general, replay_s=4.0))
        for curve in runs[-1]["curves"].values():
            curve[-1][0] = 220
    study = make(("new-4", "number", 4), ("replay", "retention", 4), trials=runs)
    return study | {"step_ratios": {"replay": cost / 1.1}}


@pytest.mark.parametrize(
    ("general", "domain", "cost", "meets"),
    [
        (0.0199, -0.5, 1.0, True),
        (0.021, -0.5, 1.0, False),  # 89.5 % gone
        (0.0199, -0.4305, 1.0, True),  # 3.5695 / 3.5 = 1.0199
        (0.0199, -0.4295, 1.0, False),  # 1.0201
        (0.0199, -0.5, 1.24, True),
        (0.0199, -0.5, 1.26, False),
        (-0.1, -0.6, 1.0, True),
    ],
)
def test_the_aim_is_met_by_share_domain_and_cost_together(
    general: float, domain: float, cost: float, meets: bool
) -> None:
    """Each alone can fail it."""
    study = kept(general, domain, cost)
    (found,) = summary.retention(study, summary.summarize(study))
    assert found["gone"].gone == pytest.approx(1 - general / 0.2)
    assert found["sets"]["packages"].gone == pytest.approx(1 - general / 0.2)
    assert found["domain"] == pytest.approx((4 + domain) / 3.5 - 1)
    assert found["cost"] == pytest.approx(cost) and found["tokens"] == pytest.approx(1.1)
    assert (found["replay_s"], found["written"]) == (4.0, pytest.approx(0.4))
    assert found["meets"] is meets
    table = summary.tables(results(study)).split("### Against forgetting")[1]
    row = table.split("## All")[0]
    assert line(row, "the replay").rstrip("| ").endswith("yes" if meets else "no")
    text = findings.findings(results(study))
    assert ("**meets the aim**" in text, "**does not meet the aim**" in text) == (meets, not meets)


def test_nothing_forgotten_has_no_share() -> None:
    """Where the plain expansion did not forget, there is nothing to keep it from."""
    study = kept(0.01, plain=-0.1)
    (found,) = summary.retention(study, summary.summarize(study))
    assert found["gone"] is None and found["meets"] is False
    assert "forgets nothing" in findings.findings(results(study))


def test_the_error_of_a_share_is_that_of_a_ratio() -> None:
    """1 of 4 left; errors 0.5 and 1: sqrt(0.5^2 + (1/4)^2) / 4."""
    spread = summary.Spread
    share = summary.share_gone(spread(1, 1, 4), spread(4, 2, 4))
    assert share.gone == 0.75 and share.error == pytest.approx((0.25 + 1 / 16) ** 0.5 / 4)


@pytest.mark.parametrize(
    ("packages", "said"),
    [(0.101, "89.9% ± 0.5% (**no clear difference**)"), (0.9, "(**less**)"), (-0.9, "(**more**)")],
)
def test_other_general_sets_are_compared_with_the_replayed_one(packages: float, said: str) -> None:
    """Replay that is only learned by heart keeps one set and not the other."""
    study = kept(0.1, plain=1.0)
    for run in study["trials"]:
        if run["variant"] == "replay":
            run["curves"]["packages"][-1][1] = 3 + 2 * packages + 0.02 * (run["seed"] - 1.5)
    text = findings.findings(results(study))
    sentence = line(text, "`the replay`")
    assert "90.0% ± 0.0% on `english`" in sentence and said in sentence


def test_a_rate_that_was_not_chosen_for_a_variant_is_said() -> None:
    """An option against forgetting takes it from the plain expansion."""
    text = findings.findings(results(kept(0.1)))
    assert "`the new-4`" in line(text, "Only one learning rate was tried for")
    taken = line(text, "The learning rate was chosen for the plain expansion and taken over by")
    assert "`the replay`" in taken and "`the new-4`" not in taken


# ---- The front and pictures ----------------------------------------------------------------------


def test_the_front_is_what_nothing_beats() -> None:
    """Neither a point with another to its lower left, nor one with another just below."""
    points = {"a": (-3.0, 3.0), "b": (-2.0, 1.0), "c": (-2.0, 2.0), "d": (-1.0, 1.5)}
    runs = [trial(name, 1, x, y / 1.5) for name, (x, y) in points.items()]
    study = make(*((name, "compared", None) for name in points), trials=runs)
    front = summary.front(summary.summarize(study))
    assert list(front) == ["the a", "the b", "base"]
    assert front["the b"] == pytest.approx(points["b"]) and front["base"] == (0, 0)
    text = findings.findings(results(study))
    sentence = line(text, "The Pareto front")
    assert sentence.endswith("`the a`, `the b`.")


def test_pictures_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a study with all groups and a failed variant, and of one with retention alone, whose
    general sets were measured at the end alone, as what a base wrote is."""
    pytest.importorskip("matplotlib")
    from matplotlib.image import imread

    monkeypatch.setattr(pictures, "DPI", 50)
    full = kept(0.02)
    for name, group in (("new-1", "number"), ("suffix", "place"), ("full", "compared")):
        about = {"name": name, "label": name, "group": group, "new_blocks": 4, "varies": ""}
        full["variants"].append(about)
        full["trials"].append(trial(name, 1, -0.3, 0.3))
    full["trials"][-1] = {"variant": "full", "lr": 1, "seed": 1, "chosen": False, "failed": "inf"}
    other = copy.deepcopy(kept(0.05)) | {"name": "small-math"}
    for run in other["trials"]:
        for name in other["general"]:
            del run["curves"][name][1]
    files = pictures.draw(results(full, other), tmp_path)
    assert [file.name for file in files] == ["curves.png", "pareto.png", "blocks.png"]
    for file in files:
        picture = imread(file)
        assert min(picture.shape[:2]) > 200 and picture[..., :3].std() > 0.01


def test_curves_average_runs_point_by_point() -> None:
    """Over sets and as changes from the base, tokens averaged too; a loss not finite is a gap."""
    study = kept(0.1)
    study["trials"][2]["curves"]["english"][1] = [110, None]
    study["trials"][2]["curves"]["packages"][1][0] = 110
    runs = pictures.paths(study, "replay", ["english", "packages"])
    assert runs.shape == (2, 3, 2)
    assert runs[:, :, 0].tolist() == [[0, 110, 220], [0, 100, 220]]
    expected = [[0, float("nan"), 0.15], [0, 0.075, 0.15]]
    assert runs[:, :, 1].ravel() == pytest.approx([*expected[0], *expected[1]], nan_ok=True)
    assert pictures.paths(study, "absent", ["english"]).shape == (0, 0, 2)
