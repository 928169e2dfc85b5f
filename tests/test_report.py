"""The report: what is written, that it reads back, and that the plots show what they should."""

import csv
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text

import sdft.report
from sdft.metrics import Cell, Estimate
from sdft.plots import plot_curves, plot_matrix
from sdft.report import RetentionReport
from sdft.selection import Selection

FILES = ["curves.png", "retention.csv", "retention.json", "retention.png"]


def report(tasks: int = 2, suites: int = 1, stages: int = 2, name: str = "task") -> RetentionReport:
    made = RetentionReport(
        [f"{name}-{i}" for i in range(tasks)], [f"suite_{i}" for i in range(suites)], 3, "sdft"
    )
    for stage in range(stages + 1):
        right = [min(10, stage + 2 * column) for column in range(tasks + suites)]
        made.add_row([Cell.from_scores([1] * k + [0] * (10 - k), 4.0, 0.1, 0.0) for k in right])
    return made


def test_the_json_has_exactly_the_documented_keys() -> None:
    values = report().to_dict()
    assert set(values) == {
        "tasks",
        "suites",
        "matrix",
        "metrics",
        "seed",
        "method",
        "stage_steps",
        "routed",
        "selection",
    }
    assert set(values["metrics"]) == {"acc", "bwt", "fwt", "forgetting", "retention", "undefined"}
    assert values["metrics"]["retention"] == {"suite_0": pytest.approx(0.2)}
    assert [[cell["score"] for cell in row] for row in values["matrix"]] == [
        [0.0, 0.2, 0.4],
        [0.1, 0.3, 0.5],
        [0.2, 0.4, 0.6],
    ]
    assert all({"score", "n", "ci95"} <= set(cell) for row in values["matrix"] for cell in row)
    assert (values["seed"], values["method"]) == (3, "sdft")


def test_the_metrics_are_those_of_the_matrix() -> None:
    metrics = report().metrics()
    assert metrics["acc"] == pytest.approx((0.2 + 0.4) / 2)
    assert metrics["bwt"] == pytest.approx(0.2 - 0.1)
    assert metrics["fwt"] == pytest.approx(0.3 - 0.2)
    assert metrics["forgetting"] == pytest.approx(0.0)


def test_what_is_written_reads_back(tmp_path: Path) -> None:
    made = report()
    made.rows[2][1] = Cell(None, 10, error="the scorer raised KeyError: 'x'")
    made.write(tmp_path / "new" / "run")
    assert sorted(os.listdir(tmp_path / "new" / "run")) == FILES
    assert RetentionReport.load(tmp_path / "new" / "run") == made
    text = (tmp_path / "new" / "run" / "retention.json").read_text()
    assert "NaN" not in text
    assert json.loads(text) == made.to_dict()


def rich() -> RetentionReport:
    """A report with all that may be measured."""
    made = report()
    made.stage_steps, made.routed = [3, None], True
    made.selection = Selection("validation", {"task-0": Cell.from_scores([1, 0, 0, 0])})
    passes = {"8": Estimate(0.75, (0.5, 1.0)), "1": Estimate(0.25, (0.0, 0.5))}
    made.rows[2][1] = replace(made.rows[2][1], kl_base=0.0123, pass_at=passes)
    return made


def test_all_that_may_be_measured_reads_back(tmp_path: Path) -> None:
    made = rich()
    made.write(tmp_path)
    assert RetentionReport.load(tmp_path) == made
    values = json.loads((tmp_path / "retention.json").read_text())
    cell = values["matrix"][2][1]
    assert cell["pass_at"]["8"] == {"score": 0.75, "ci95": [0.5, 1.0]}
    assert cell["kl_base"] == 0.0123
    assert values["selection"]["split"] == "validation"
    assert values["selection"]["cells"]["task-0"]["score"] == 0.25
    assert (values["stage_steps"], values["routed"]) == ([3, None], True)


def test_a_report_of_an_older_version_reads() -> None:
    values = report().to_dict()
    for key in ("stage_steps", "routed", "selection"):
        del values[key]
    for cell in (cell for row in values["matrix"] for cell in row):
        del cell["kl_base"], cell["pass_at"]
    assert RetentionReport.from_dict(values) == report()


def test_the_csv_has_columns_for_every_pass_at_k(tmp_path: Path) -> None:
    rich().write(tmp_path)
    with open(tmp_path / "retention.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    names = [f"pass@{k}{end}" for k in (1, 8) for end in ("", "_low", "_high")]
    assert list(lines[0])[-7:] == ["kl_base", *names]
    assert [lines[7][name] for name in names] == ["0.25", "0.0", "0.5", "0.75", "0.5", "1.0"]
    assert lines[7]["kl_base"] == "0.0123"
    assert {lines[6][name] for name in names} == {""}


def test_a_line_for_each_thing_beside_the_scores() -> None:
    lines = rich().summary_table().splitlines()
    assert lines[5:9] == [
        "routed: one model per task",
        "KL(base ‖ student): task-1 0.012",
        "pass@1/8: task-1 0.25/0.75",
        "validation split: task-0 0.25",
    ]
    assert not any(line.startswith(("routed", "KL", "pass")) for line in _plain_lines())


def _plain_lines() -> list[str]:
    return report().summary_table().splitlines()


def test_plots_of_a_router_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    captions: list[str] = []

    def plot(*args: Any) -> Figure:
        captions.append(args[-1])
        return Figure()

    for name in ("plot_matrix", "plot_curves"):
        monkeypatch.setattr(sdft.report, name, plot)
    report().write(tmp_path)
    rich().write(tmp_path)
    assert ["routed: one model per task" in caption for caption in captions] == [False] * 2 + [
        True
    ] * 2


def test_a_report_can_be_written_before_any_row(tmp_path: Path) -> None:
    made = RetentionReport(["a"], ["p"], None, "sft")
    made.write(tmp_path)
    assert RetentionReport.load(tmp_path) == made
    assert made.matrix.shape == (0, 2)


def test_the_csv_has_a_line_per_cell(tmp_path: Path) -> None:
    made = report()
    made.rows[1][0] = Cell(None, 0, error="no test examples")
    made.write(tmp_path)
    with open(tmp_path / "retention.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [(line["stage"], line["row"], line["column"], line["kind"]) for line in lines[2:5]] == [
        ("0", "base", "suite_0", "suite"),
        ("1", "task-0", "task-0", "task"),
        ("1", "task-0", "task-1", "task"),
    ]
    assert len(lines) == 9
    assert lines[3]["score"] == lines[3]["low"] == lines[3]["artifact"] == ""
    low, high = made.rows[2][1].ci95 or (None, None)
    assert lines[7] == {
        "stage": "2",
        "row": "task-1",
        "column": "task-1",
        "kind": "task",
        "score": "0.4",
        "low": str(low),
        "high": str(high),
        "n": "10",
        "mean_length": "4.0",
        "truncated": "0.1",
        "artifact": "0.0",
        "kl_base": "",
    }


def test_a_failing_plot_keeps_the_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report(stages=1).write(tmp_path)
    old = (tmp_path / "retention.png").read_bytes()

    def fail(figure: Figure, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(sdft.report, "save_figure", fail)
    with pytest.raises(OSError, match="disk full"):
        report(stages=2).write(tmp_path)
    assert sorted(os.listdir(tmp_path)) == FILES
    assert (tmp_path / "retention.png").read_bytes() == old
    assert RetentionReport.load(tmp_path) == report(stages=2)


@pytest.mark.parametrize("content", ["{", "[]", '{"tasks": []}', '{"a": "\xff"}'])
def test_a_damaged_report_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "retention.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=r"retention\.json is not a retention report"):
        RetentionReport.load(tmp_path)


def test_bad_rows_are_rejected() -> None:
    made = report()
    with pytest.raises(ValueError, match="a row needs 3 cells, found 1"):
        made.add_row([Cell(None, 0)])
    with pytest.raises(ValueError, match="all 2 stages already have their row"):
        made.add_row([Cell(None, 0)] * 3)


def test_the_matrix_is_nan_where_undefined() -> None:
    made = report()
    made.rows[0][2] = Cell(None, 0)
    assert torch.isnan(made.matrix).nonzero().tolist() == [[0, 2]]
    assert made.matrix.dtype == torch.float64


def test_the_summary_says_scores_metrics_and_why_some_are_undefined() -> None:
    made = report(stages=1)
    made.rows[1][1] = Cell(None, 0, error="x")
    lines = made.summary_table().splitlines()
    assert [line.split() for line in lines[:4]] == [
        ["base", "1", "95", "%", "n"],
        ["1.", "task-0", "0.00", "0.10", "0.02–0.40", "10"],
        ["2.", "task-1", "0.20", "n/a", "0"],
        ["suite", "suite_0", "0.40", "0.50", "0.24–0.76", "10"],
    ]
    assert lines[4] == "ACC 0.10   BWT n/a   FWT n/a   forgetting n/a"
    assert lines[5] == "bwt undefined: needs 2 finished stages, found 1"
    assert len({len(line) for line in lines[:4]}) == 1


Plot = Callable[[Sequence[Sequence[Cell]], Sequence[str], Sequence[str], str], Figure]


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text)]


def test_the_heat_map_shows_every_score_and_marks_the_undefined() -> None:
    made = report()
    made.rows[2][2] = Cell(None, 0)
    figure = plot_matrix(made.rows, made.tasks, made.suites, "caption")
    found = texts(figure)
    assert sorted(t for t in found if t in {f"{k / 10:.2f}" for k in range(11)}) == sorted(
        f"{cell.score:.2f}" for row in made.rows for cell in row if cell.score is not None
    )
    assert found.count("n/a") == 1
    hatched = [box for box in figure.findobj(Rectangle) if box.get_hatch()]
    assert [(int(box.get_x()), int(box.get_y())) for box in hatched] == [(2, 2)]
    framed = [b for b in figure.findobj(Rectangle) if not b.get_fill() and b.get_linewidth() == 2]
    assert [(int(box.get_x()), int(box.get_y())) for box in framed] == [(0, 1), (1, 2)]
    assert {"tasks", "prior suites", "base", "1. task-0", "2. task-1", "caption"} <= set(found)


def test_the_suites_stand_apart_in_the_heat_map() -> None:
    made = report()
    figure = plot_matrix(made.rows, made.tasks, made.suites, "")
    first, second, suite = figure.axes[0].get_xticks()
    assert suite - second > second - first


def test_a_curve_shades_the_stage_that_trains_its_task() -> None:
    made = report()
    figure = plot_curves(made.rows, made.tasks, made.suites, "")
    spans = [
        [(p.get_x(), p.get_width()) for p in axes.patches if isinstance(p, Rectangle)]
        for axes in figure.axes
    ]
    assert spans == [[(0, 1)], [(1, 1)], []]
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        "1. task-0",
        "2. task-1",
        "suite_0",
    ]


LONG = "a_task_name_of_more_than_forty_characters_"


@pytest.mark.parametrize(
    ("tasks", "suites", "stages", "name"),
    [(1, 0, 0, "t"), (1, 0, 0, LONG), (2, 3, 1, "t"), (2, 3, 1, LONG), (8, 4, 8, LONG)],
)
@pytest.mark.parametrize("plot", [plot_matrix, plot_curves])
def test_no_two_labels_overlap(tasks: int, suites: int, stages: int, name: str, plot: Plot) -> None:
    made = report(tasks, suites, stages, name)
    figure = plot(made.rows, made.tasks, made.suites, "sdft, seed 3\nACC n/a")
    FigureCanvasAgg(figure)
    figure.draw_without_rendering()
    boxes = [(t, t.get_window_extent().extents) for t in figure.findobj(Text) if shown(t)]
    right, top = figure.bbox.max
    for i, (text, (x0, y0, x1, y1)) in enumerate(boxes):
        assert 0 <= x0 < x1 <= right, text
        assert 0 <= y0 < y1 <= top, text
        for other, (u0, v0, u1, v1) in boxes[:i]:
            # The boxes of slanted labels overlap where the labels do not.
            slanted = text.get_rotation() % 90 and other.get_rotation() % 90
            assert slanted or x1 <= u0 or u1 <= x0 or y1 <= v0 or v1 <= y0, (text, other)


def shown(text: Text) -> bool:
    return bool(text.get_text()) and text.get_visible()
