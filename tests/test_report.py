"""The report: exact numbers in its table, a picture that shows something, clear errors."""

import json
import struct
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llamapro import report
from llamapro.errors import ConfigError, DataError
from llamapro.report import result_table, write_report

Run = Callable[..., tuple[int, str, str]]
Reported = tuple[Path, dict[str, Any]]


def make_run(
    run_dir: Path,
    sets: dict[str, tuple[float, float]],
    trainable: str = "new_blocks",
    count: int = 1_619_000_000,
) -> Path:
    """Writes a run of 40 steps whose validation losses go straight from one number to another."""
    run_dir.mkdir(parents=True)
    info: dict[str, Any] = {
        "settings": {"model": {"path": "base"}, "train": {"trainable": trainable}},
        "parameters": {"total": 8_357_000_000, "trainable": count},
        "new_layers": [4, 9] if trainable == "new_blocks" else None,
        "tokens_per_step": 1_000_000,
        "versions": {"torch": "2.13.0"},
    }
    records: list[dict[str, Any]] = []
    for step in range(41):
        tokens = step * 1_000_000
        if step % 10 == 0:
            records += [
                {
                    "kind": "eval",
                    "step": step,
                    "set": name,
                    "loss": first + (last - first) * step / 40,
                    "tokens_seen": tokens,
                }
                for name, (first, last) in sets.items()
            ]
        if step:
            records.append(
                {
                    "kind": "train",
                    "step": step,
                    "loss": 2.0 - step / 100,
                    "learning_rate": 2e-4,
                    "tokens": tokens,
                    "tokens_per_s": 41_000.0 + step,
                    "elapsed_s": step * 24.4,
                    "memory_bytes": 3 * 2**30,
                }
            )
    (run_dir / "run.json").write_text(json.dumps(info))
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return run_dir


@pytest.fixture
def pro(tmp_path: Path) -> Path:
    return make_run(tmp_path / "pro", {"domain": (2.104, 1.612), "general": (1.75, 1.758)})


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Reported:
    """The directory of a report on two runs, and their numbers."""
    path = tmp_path_factory.mktemp("report")
    pro = make_run(path / "pro", {"domain": (2.104, 1.612), "general": (1.75, 1.758)})
    sets = {"domain": (2.104, 1.583), "code": (1.5, 1.4998)}
    return pro, write_report([pro, make_run(path / "full", sets, "all", 8_357_000_000)])


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Collects the figures instead of drawing them, which takes most of a report's time."""
    found: list[Any] = []
    figure = pytest.importorskip("matplotlib.figure").Figure
    monkeypatch.setattr(figure, "savefig", lambda self, *_, **__: found.append(self))
    return found


def table_rows(text: str) -> list[list[str]]:
    """The cells of the first Markdown table in a text, without its rule."""
    lines = [line for line in text.split("\n\n## ")[0].splitlines() if line.startswith("|")]
    return [
        [cell.strip() for cell in line[1:-1].split(" | ")] for line in lines if "---" not in line
    ]


def test_table_shows_what_each_run_learned_and_forgot(reported: Reported) -> None:
    """Every cell is exact; a set that a run was not evaluated on is a dash."""
    header, *rows = table_rows(result_table(reported[1]["runs"], ["domain", "general", "code"]))
    assert header[:4] == ["run", "trains", "trainable parameters", "tokens"]
    assert header[4:] == ["domain base -> final", "general base -> final", "code base -> final"]
    assert [row[:4] for row in rows] == [
        ["pro", "new_blocks", "1.62B (19.4%)", "40.0M"],
        ["full", "all", "8.36B (100.0%)", "40.0M"],
    ]
    assert [row[4:] for row in rows] == [
        ["2.104 -> 1.612 (-0.492, learned)", "1.750 -> 1.758 (+0.008, forgot)", "-"],
        ["2.104 -> 1.583 (-0.521, learned)", "-", "1.500 -> 1.500 (+0.000, kept)"],
    ]


def test_page_holds_table_words_training_settings_and_picture(reported: Reported) -> None:
    """report.md says what was learned in words with perplexities, what it cost, and with what."""
    page = (reported[0] / "report.md").read_text(encoding="utf-8")
    assert "](report.png)" in page
    assert (
        "- **pro** learned `domain` (loss -0.492, perplexity 8.20 -> 5.01); "
        "forgot `general` (loss +0.008, perplexity 5.75 -> 5.80)."
    ) in page
    assert "| pro  | 40    | 1.645               | 41.0k tok/s | 16m16s | 3.00 GiB    |" in page
    settings = [line for line in page.split("## Settings")[1].splitlines() if line[:1] == "|"]
    keys = [line.split("|")[1].strip() for line in settings[2:]]
    # Settings that differ between the runs come first.
    assert keys == [
        "**train.trainable**",
        "**new_layers**",
        "model.path",
        "tokens_per_step",
        "versions.torch",
    ]


def test_picture_is_a_png_with_something_in_it(reported: Reported) -> None:
    """The file is a PNG, wide enough to read, and no panel is blank: both runs' colours occur."""
    image = pytest.importorskip("matplotlib.image")
    data = (reported[0] / "report.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    assert width == 1800
    assert 900 < height < 1500
    pixels = (image.imread(reported[0] / "report.png")[..., :3] * 255).round().astype(int)
    for colour in ((0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00), (0x59, 0x59, 0x59)):
        assert (pixels == colour).all(axis=-1).sum() > 500
    for third in range(3):  # each panel of the upper row
        part = pixels[100 : height // 2, third * 600 + 100 : third * 600 + 500]
        assert part.std() > 5


@pytest.mark.parametrize("count", [1, 2, 4, 5])
def test_any_number_of_sets_has_a_panel_each(
    tmp_path: Path, count: int, figures: list[Any]
) -> None:
    """More sets make a higher picture; none is dropped and none refused."""
    write_report([make_run(tmp_path / "run", {f"set{i}": (2.0, 1.0) for i in range(count)})])
    (figure,) = figures
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles[:count] == [f"set{i}" for i in range(count)]
    assert titles[count:] == ["training", "learning rate", "throughput"]
    assert figure.get_figheight() == pytest.approx(3.5 + 3.6 * (1 if count < 4 else 2))


def test_a_run_without_evaluations_is_reported_and_says_so(
    tmp_path: Path, figures: list[Any]
) -> None:
    """No evaluation records: the rest of the report is made, and the gap is put into words."""
    run = make_run(tmp_path / "run", {})
    result = write_report([run])
    assert result["runs"][0]["sets"] == {}
    assert result["runs"][0]["tokens"] == 40_000_000
    page = (run / "report.md").read_text(encoding="utf-8")
    assert "**run** has no evaluation both before and after training" in page
    assert len(figures[0].axes) == 3


def test_what_run_json_lacks_is_a_dash(tmp_path: Path) -> None:
    """An empty run.json and an empty log still make a report."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text("{}")
    (run / "metrics.jsonl").touch()
    summaries = write_report([run])["runs"]
    assert table_rows(result_table(summaries, []))[1] == ["run", "-", "-", "-"]


def test_names_that_read_as_markup_are_shown_as_they_are(tmp_path: Path) -> None:
    """Dollar signs are no formula in the picture, and a bar does not split a table's cell."""
    run = make_run(tmp_path / "a$\\x$|b", {"c$^$": (2.0, 1.0)})
    summaries = write_report([run], tmp_path / "out")["runs"]
    assert result_table(summaries, ["c$^$"]).splitlines()[2].startswith(r"| a$\x$\|b |")


def test_runs_of_one_name_are_told_apart(tmp_path: Path, figures: list[Any]) -> None:
    """Equal directory names get their parents' names in front."""
    runs = [make_run(tmp_path / parent / "run", {"general": (2.0, 1.0)}) for parent in ("a", "b")]
    names = [summary["run"] for summary in write_report(runs)["runs"]]
    assert names == ["a/run", "b/run"]


def test_wrong_directories_are_refused(pro: Path, tmp_path: Path) -> None:
    """No run, a run twice, and a directory that is none are each the user's mistake."""
    with pytest.raises(ConfigError, match="no run directory given"):
        write_report([])
    with pytest.raises(ConfigError, match="given twice"):
        write_report([pro, pro.parent / "x" / ".." / "pro"])
    with pytest.raises(DataError, match=r"nowhere: no run\.json; is this a run directory\?"):
        write_report([tmp_path / "nowhere"])
    (pro / "metrics.jsonl").unlink()
    with pytest.raises(DataError, match=r"no metrics\.jsonl"):
        write_report([pro])


def test_an_output_that_cannot_be_made_is_named(pro: Path, tmp_path: Path) -> None:
    """A file where the output directory should be is refused with its path."""
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="file: cannot be written"):
        write_report([pro], tmp_path / "file")


def test_without_matplotlib_the_extra_is_named(pro: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message says what to install, and what failed; nothing is written."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r"pip install -e '\.\[report\]' \(.*matplotlib\.figure"):
        write_report([pro])
    monkeypatch.setitem(sys.modules, "matplotlib.figure", types.ModuleType("matplotlib.figure"))
    with pytest.raises(ConfigError, match=r"needs matplotlib: .*\(cannot import name 'Figure'"):
        write_report([pro])  # one that is there and broken
    assert not (pro / "report.md").exists()


def test_command_prints_the_table_and_writes_where_told(
    pro: Path, tmp_path: Path, run_command: Run
) -> None:
    """Standard output is the table alone; the files are named on standard error."""
    out = tmp_path / "new" / "out"
    status, shown, notes = run_command(report.main, pro, "--out", out)
    assert status == 0
    assert [row[0] for row in table_rows(shown)] == ["run", "pro"]
    assert all(line.startswith("|") for line in shown.splitlines())
    assert "report.png" in notes
    assert sorted(p.name for p in out.iterdir()) == ["report.md", "report.png"]


def test_command_prints_one_json_object(
    reported: Reported, run_command: Run, figures: list[Any]
) -> None:
    """--json gives each run's losses per set, null where there is none, and the files."""
    pro = reported[0]
    status, shown, _ = run_command(report.main, pro, pro.parent / "full", "--json")
    assert status == 0
    result = json.loads(shown)
    general = [run["sets"]["general"] for run in result["runs"]]
    assert general[0] == {"initial_loss": 1.75, "final_loss": 1.758, "change": pytest.approx(0.008)}
    assert general[1] == {"initial_loss": None, "final_loss": None, "change": None}
    assert result["files"] == [str(pro / "report.png"), str(pro / "report.md")]


def test_command_exits_2_on_a_mistake_without_a_traceback(tmp_path: Path, root: Path) -> None:
    """The message goes to standard error, and standard output stays empty."""
    line = [sys.executable, "-m", "llamapro.report", str(tmp_path)]
    done = subprocess.run(line, cwd=root, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("DataError: ")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("step", -1),
        ("step", True),
        ("loss", "low"),
        ("tokens", [1]),
        ("elapsed_s", 10**400),
        ("tokens_per_s", False),
        ("set", {}),
    ],
)
def test_a_log_with_a_value_of_another_kind_is_refused(
    tmp_path: Path, key: str, value: Any
) -> None:
    """The message names the line."""
    run = make_run(tmp_path / "run", {"code": (2.0, 1.0)})
    log = run / "metrics.jsonl"
    lines = log.read_text().splitlines()
    lines[3] = json.dumps(json.loads(lines[3]) | {key: value})
    log.write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match=r"metrics\.jsonl:4: expected a JSON object with 'kind'"):
        write_report([run])


def test_a_log_with_a_line_that_nests_too_deep_is_refused(tmp_path: Path) -> None:
    """It is no traceback; the message names the line."""
    run = make_run(tmp_path / "run", {"code": (2.0, 1.0)})
    log = run / "metrics.jsonl"
    log.write_text("[" * 100_000 + "\n" + log.read_text())
    with pytest.raises(DataError, match=r"metrics\.jsonl:1: expected a JSON object with 'kind'"):
        write_report([run])


def test_a_count_that_is_no_number_is_refused(tmp_path: Path) -> None:
    """It stands in run.json."""
    run = make_run(tmp_path / "run", {"code": (2.0, 1.0)})
    info = json.loads((run / "run.json").read_text())
    info["parameters"]["total"] = "many"
    (run / "run.json").write_text(json.dumps(info))
    with pytest.raises(DataError, match=r"run\.json: parameters\.total is 'many', not a number"):
        write_report([run])
