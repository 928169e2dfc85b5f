"""The files of a comparison: JSON, CSV, LaTeX, pictures and the page."""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from fake_runs import SETTINGS, SUITES, TASKS, cost, finish, loaded, make_plan, retention, summarise
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

from sdft.comparison.folder import RunFolder
from sdft.comparison.page import page
from sdft.comparison.pareto import front
from sdft.comparison.pictures import pictures
from sdft.comparison.plan import Plan
from sdft.comparison.report import write_report
from sdft.comparison.settings import run_settings
from sdft.comparison.summary import Summary
from sdft.comparison.tables import latex, latex_table

COMMAND = "python -m sdft compare --config configs/compare_quick.yaml"
COLUMNS = [*TASKS, *SUITES]
HOSTILE = "<script>alert('&')</script>"
FILES = {
    "compare.json",
    "compare.csv",
    "summary.csv",
    "table.tex",
    "compare.png",
    "curves.png",
    "pareto.png",
    "kl_forgetting.png",
    "length.png",
    "report.html",
}


def rows(quality: float, kept: float) -> list[list[float | None]]:
    return [
        [0.0, 0.1, 1.0, 1.0],
        [quality, 0.1, (1 + kept) / 2, (1 + kept) / 2],
        [quality * kept, quality, kept, kept],
    ]


def fill(plan: Plan, **qualities: tuple[float, float]) -> None:
    for place, run in enumerate(plan.runs):
        if run.method.name not in qualities:
            continue
        quality, kept = qualities[run.method.name]
        own = rows(quality - 0.01 * run.seed, kept - 0.02 * (run.rate or 0.0) * 1e3)
        selection = dict(zip(COLUMNS, own[-1], strict=True))
        length = 5.0 + place
        report = retention(own, selection=selection, kl=0.05 + place / 20, length=length)
        spent = cost(30.0, 5e12) if run.method.name == "sdft" else cost(10.0, 2e12)
        finish(plan, run, report, spent)


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    sweep = {"learning_rates": [1e-4, 3e-4]}
    methods = {"sdft": {**sweep, "label": "SDFT"}, "sft": {**sweep, "label": HOSTILE}}
    made = make_plan(tmp_path, methods, baseline="sft")
    fill(made, sdft=(0.95, 0.99), sft=(0.9, 0.3))
    return made


@pytest.fixture
def summary(plan: Plan) -> Summary:
    return summarise(plan)


class Page(HTMLParser):
    """Checks that what is opened is closed, and keeps text, tags and what is referred to."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.links: list[str] = []
        self.words = ""
        self.feed(source)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.links += [value or "" for key, value in attrs if key in ("src", "href")]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data


# ---------------------------------------------------------------- all files


def test_everything_is_there(summary: Summary, tmp_path: Path) -> None:
    write_report(summary, tmp_path / "report", COMMAND)
    assert {path.name for path in (tmp_path / "report").iterdir()} == FILES
    for name in FILES:
        if name.endswith(".png"):
            assert (tmp_path / "report" / name).read_bytes().startswith(b"\x89PNG")


def test_the_json_holds_every_run_and_no_nan(summary: Summary, tmp_path: Path) -> None:
    def refuse(constant: str) -> Any:
        raise AssertionError(constant)

    write_report(summary, tmp_path / "report", COMMAND)
    text = (tmp_path / "report" / "compare.json").read_text()
    found = json.loads(text, parse_constant=refuse)
    assert len(found["runs"]) == 8
    for run in found["runs"]:
        report = json.loads((Path(run["folder"]) / "retention.json").read_text())
        assert run["retention"] == report
        assert run["cost"]["training"]["seconds"] in (10.0, 30.0)
        assert {"method", "learning_rate", "seed", "status", "chosen"} <= set(run)
    assert sum(run["chosen"] for run in found["runs"]) == 4
    assert found["winner"] == "sdft"
    assert found["summary"]["sdft"]["cost"]["flops_x"] == 2.5
    assert set(found["rates"]["sft"][0]) >= {"learning_rate", "selection_score", "mean", "n"}
    assert found["command"] == COMMAND


def test_the_long_csv_has_one_row_per_run_stage_and_column(
    summary: Summary, tmp_path: Path
) -> None:
    write_report(summary, tmp_path / "report", COMMAND)
    with open(tmp_path / "report" / "compare.csv", newline="") as file:
        found = list(csv.DictReader(file))
    assert len(found) == 8 * 3 * 4
    last = found[-1]
    assert (last["method"], last["learning_rate"], last["seed"]) == ("sft", "0.0003", "1")
    assert (last["stage"], last["row"], last["column"], last["kind"]) == (
        "2",
        "forest",
        "basic",
        "suite",
    )
    assert float(last["score"]) == pytest.approx(0.294)
    assert float(last["low"]) == pytest.approx(0.244)
    assert {row["chosen"] for row in found} == {"True", "False"}


def test_the_summary_csv(summary: Summary, tmp_path: Path) -> None:
    write_report(summary, tmp_path / "report", COMMAND)
    with open(tmp_path / "report" / "summary.csv", newline="") as file:
        sdft, sft = csv.DictReader(file)
    assert sft["label"] == HOSTILE
    own = summary.standing["sdft"].estimates["acc"]
    assert own.ci95 is not None
    assert (float(sdft["acc"]), float(sdft["acc_low"])) == (own.mean, own.ci95[0])
    assert (sdft["seconds_x"], sft["seconds_x"]) == ("3.0", "1.0")


# ---------------------------------------------------------------- LaTeX


def test_latex_prints_any_text_as_it_is() -> None:
    assert latex(r"a_b & 50% {x} #1 $ ~ ^ \n") == (
        r"a\_b \& 50\% \{x\} \#1 \$ \textasciitilde{} \textasciicircum{} \textbackslash{}n"
    )


def test_the_latex_table(summary: Summary) -> None:
    table = latex_table(summary)
    for rule in ("toprule", "midrule", "bottomrule"):
        assert table.count(rf"\{rule}") == 1
    body = [line for line in table.splitlines() if line.endswith(r"\\")]
    assert {line.count(" & ") for line in body} == {8}
    _, sdft, sft = body
    assert sdft.count(r"\textbf{") == 5, "the best of each quality"
    assert r"\textbf{" not in sft
    assert r"\&" in sft, "the label is escaped"
    assert sdft.endswith(r"3.0 & 2.5 \\")


def test_upper_bounds_stand_apart_and_are_never_bold(tmp_path: Path) -> None:
    methods = {"sft": None, "joint": {"upper_bound": True}}
    plan = make_plan(tmp_path, methods)
    fill(plan, sft=(0.5, 0.5), joint=(1.0, 1.0))
    table = latex_table(summarise(plan))
    assert table.count(r"\midrule") == 2
    assert r"\textbf" not in table.split(r"\midrule")[2]
    assert table.split(r"\midrule")[1].count(r"\textbf") == 5


# ---------------------------------------------------------------- the page


def test_the_page_is_whole_and_needs_nothing_beside_it(summary: Summary) -> None:
    found = Page(page(summary, pictures(summary), COMMAND))
    assert found.tags["img"] == 5
    assert all(link.startswith(("data:image/png;base64,", "#")) for link in found.links)
    assert found.tags["link"] == found.tags["script"] == 0


def test_the_page_says_who_won_and_what_it_cost(summary: Summary) -> None:
    text = re.sub(r"\s+", " ", Page(page(summary, [], COMMAND)).words)
    assert "SDFT has the highest mean score over all 4 columns" in text
    assert "took 3.0 × the time of" in text
    assert "and 2.5 × its FLOPs" in text
    assert "4 × the time and 2.5 × the FLOPs of SFT" in text, "the paper's figures"
    assert "on the validation split; of equal ones the smaller" in text
    assert COMMAND in text
    assert "Student's 95 % interval" in text
    assert "Every run made 60 + 60 optimizer steps." in text


def test_the_page_s_differences_stand_under_their_heads(summary: Summary) -> None:
    source = page(summary, [], COMMAND)
    table = source.split("SDFT against the others")[1].split("</table>")[0]
    heads = re.findall(r"<th>([^<]*)</th>", table)
    assert heads == ["SDFT minus", "all columns", "ACC", "prior", "seeds"]
    cells = re.findall(r"<td>([^<]*)<", table)
    shown = dict(zip(heads[1:4], cells[1:4], strict=True))
    pairs = {pair.quality: pair.difference.estimate.mean for pair in summary.pairs}
    for head, quality in (("all columns", "mean"), ("ACC", "acc"), ("prior", "prior")):
        assert re.match(rf"\{pairs[quality]:+.2f}, (better|no verdict)", shown[head])


def test_text_is_escaped(summary: Summary) -> None:
    source = page(summary, pictures(summary), f"{COMMAND} --out '<b>'")
    assert HOSTILE not in source
    assert "&lt;script&gt;" in source
    assert HOSTILE in Page(source).words
    assert "<b>" not in source


def test_failed_runs_are_on_the_page(plan: Plan) -> None:
    folder = RunFolder(plan.folder(plan.runs[0]))
    folder.finished_file.unlink()
    folder.log.write_text("step 1\nRuntimeError: <bad> & worse\n")
    folder.fail("ended with status 1", resumed=False)
    RunFolder(plan.folder(plan.runs[1])).finished_file.unlink()
    summary = summarise(plan)
    text = Page(page(summary, [], COMMAND)).words
    assert "1 of 8 runs failed" in text
    assert "RuntimeError: <bad> & worse" in text
    assert "1 of 8 runs are not there yet: sdft, lr 3e-4, seed 0" in re.sub(r"\s+", " ", text)


def test_a_comparison_without_a_finished_run_has_a_page_all_the_same(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, {"sft": None})
    for run in plan.runs:
        folder = RunFolder(plan.folder(run))
        folder.prepare(run_settings(SETTINGS, run, folder.path))
        folder.fail("ended with status 2", resumed=False)
    summary = summarise(plan)
    write_report(summary, plan.out, COMMAND)
    assert "nothing to compare yet" in Page((plan.out / "report.html").read_text()).words
    found = json.loads((plan.out / "compare.json").read_text())
    assert found["winner"] is None
    assert found["summary"]["sft"]["undefined"]["acc"] == "no finished run"
    assert len(found["failed"]) == 2


# ---------------------------------------------------------------- pictures


def test_the_front_is_what_no_point_surpasses() -> None:
    points = [(0.2, 0.9), (0.5, 0.8), (0.4, 0.7), (1.0, 0.1), (0.9, 0.1), (0.5, 0.5)]
    assert front(points) == [(1.0, 0.1), (0.5, 0.8), (0.2, 0.9)]
    assert front([]) == []
    assert front([(0.5, 0.5), (0.5, 0.5)]) == [(0.5, 0.5)]


def test_without_suites_and_drift_there_are_fewer_pictures(tmp_path: Path) -> None:
    from copy import deepcopy

    settings = deepcopy(SETTINGS)
    settings["data"]["init_args"]["suites"] = []
    plan = make_plan(tmp_path, {"sft": None})
    for run in plan.runs:
        report = retention([[0.0, 0.0], [0.5, 0.0], [0.4, 0.6]], suites=[])
        finish(plan, run, report, settings=settings)
    found = [picture.name for picture in pictures(Summary(plan, loaded(plan, settings)))]
    assert found == ["compare", "curves", "length"]


@pytest.mark.parametrize("count", [3, 16])
def test_labels_cover_no_other_label(tmp_path: Path, count: int) -> None:
    methods = {f"method-{i}": None for i in range(count)}
    plan = make_plan(tmp_path, methods)
    fill(plan, **{name: (0.3 + 0.04 * i, 0.9 - 0.05 * i) for i, name in enumerate(methods)})
    (picture,) = (p for p in pictures(summarise(plan)) if p.name == "pareto")
    canvas = FigureCanvasAgg(picture.figure)
    canvas.draw()
    texts = [text for text in picture.figure.axes[0].texts if text.get_text()]
    assert len(texts) == count + 1, "every method, and the base"
    # Of the text alone: an annotation's own extent includes its arrow.
    boxes = [Text.get_window_extent(text, canvas.get_renderer()) for text in texts]
    frame = picture.figure.bbox
    for place, box in enumerate(boxes):
        assert frame.x0 <= box.x0
        assert box.x1 <= frame.x1
        for other in boxes[place + 1 :]:
            across = min(box.x1, other.x1) - max(box.x0, other.x0)
            up = min(box.y1, other.y1) - max(box.y0, other.y0)
            assert across <= 1 or up <= 3, "labels overlap"


def test_legends_and_titles_lie_within_every_picture(tmp_path: Path) -> None:
    methods = {f"a-method-with-a-long-name-{i}": None for i in range(12)}
    plan = make_plan(tmp_path, methods)
    fill(plan, **{name: (0.3 + 0.05 * i, 0.9) for i, name in enumerate(methods)})
    for picture in pictures(summarise(plan)):
        canvas = FigureCanvasAgg(picture.figure)
        canvas.draw()
        renderer, frame = canvas.get_renderer(), picture.figure.bbox
        (legend,) = picture.figure.legends or [None]
        parts = [*picture.figure.texts, *([legend] if legend else [])]
        for part in parts:
            box = part.get_window_extent(renderer)
            assert box.x1 <= frame.x1 + 1, (picture.name, part)
            assert box.y0 >= 0, picture.name
        if legend is not None:
            bottom = legend.get_window_extent(renderer).y0
            tops = [axes.get_window_extent(renderer).y1 for axes in picture.figure.axes]
            assert max(tops) < bottom, f"{picture.name}: the legend covers a panel"
