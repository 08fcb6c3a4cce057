"""The page: whole, self-contained, and safe from what its records say."""

import base64
import json
import re
import struct
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from browser import needs_browser, rendered
from fourge.reports.quality import place_on_scale
from fourge_process import run
from reports.conftest import Recorded, good

SECTIONS = ["evaluation", "doctor", "coverage", "amax", "weights", "size", "run"]
CHARTS = [
    "KL by position",
    "From layer to layer",
    "Tokens per expert, layer by layer",
    "Experts seen against tokens",
    "Largest inputs by layer and pass",
    "Weights against the source",
]
DTYPES = {"f8": "d", "f4": "f", "i4": "i", "i2": "h", "i1": "b", "u1": "B", "u2": "H", "u4": "I"}


class Page(HTMLParser):
    """What a page refers to, its headings, and its figures by title."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.references: list[str] = []
        self.ids: list[str] = []
        self.headings: list[str] = []
        self.scripts: list[str] = []
        self._open = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        self._open = tag if named.get("type") != "application/json" else "figure"
        if tag == "script":
            self.scripts.append(named.get("type") or "javascript")
        self.references += [str(named[key]) for key in ("src", "href", "data") if key in named]
        self.ids += [str(named["id"])] if tag == "h2" else []

    def handle_data(self, data: str) -> None:
        if self._open == "h3":
            self.headings.append(data)
            self._open = ""


def figures(page: str) -> dict[str, Any]:
    titles = re.findall(r"<h3>([^<]*)</h3>\s*<figure", page)
    texts = re.findall(r'<script type="application/json">(.*?)</script>', page, re.DOTALL)
    return dict(zip(titles, map(json.loads, texts), strict=True))


def values(array: Any) -> list[float]:
    """A plotly array as numbers: it writes long ones as base64."""
    if not isinstance(array, dict):
        return array
    data = base64.b64decode(array["bdata"])
    return list(
        struct.unpack(f"<{len(data) // int(array['dtype'][1])}{DTYPES[array['dtype']]}", data)
    )


def test_everything_is_inside(own: Recorded):
    good("report", own.folder)
    page = Page(own.page)
    assert page.references == [f"#{name}" for name in SECTIONS]
    assert page.ids == SECTIONS
    assert "url(" not in own.page.split("<style>")[1].split("</style>")[0]
    assert list(figures(own.page)) == CHARTS
    assert "Not measured" not in own.page


@needs_browser
def test_a_browser_draws_every_chart(own: Recorded, tmp_path: Path):
    good("report", own.folder)
    document = rendered(own.folder / "fourge" / "report.html", tmp_path / "profile")
    drawn = re.findall(r'<div [^>]*class="js-plotly-plot"[^>]*>', document)
    assert len(drawn) == len(CHARTS)
    for text in ("position in the window", "experts seen", "W4A16", "relative RMS error"):
        assert re.search(rf"<text[^>]*>{text}</text>", document), text


def test_charts_show_what_is_on_record(own: Recorded):
    good("report", own.folder)
    charts = figures(own.page)
    lanes = own.evaluation["lanes"]
    drawn = {one["name"]: values(one["y"]) for one in charts["KL by position"]["data"]}
    assert set(drawn) == {"W4A16", "W4A4", "floor"}
    assert drawn["W4A4"] == [one["kl_mean"] for one in lanes["w4a4"]["by_position"]]

    coverage = own.record("coverage.json")
    tokens = [layer["passes"]["data"]["tokens"] for layer in coverage["layers"]]
    seen, *never = charts["Tokens per expert, layer by layer"]["data"]
    assert values(seen["customdata"]) == [count for layer in tokens for count in layer]
    assert bool(never) == any(count == 0 for layer in tokens for count in layer)

    curve = charts["Experts seen against tokens"]["data"][0]
    assert values(curve["y"]) == coverage["saturation"]["experts_seen"]

    errors = own.record("doctor.json")["figures"]["weight_error"]
    drawn = {one["name"]: values(one["y"]) for one in charts["Weights against the source"]["data"]}
    own_errors = [one["relative_rms"] for one in errors if one["projection"] == "down_proj"]
    assert drawn["down, layer"] == own_errors


def test_findings_are_shown_with_their_remedy(own: Recorded):
    finding = {
        "rule": "S04", "severity": "error", "where": "model.layers.1.mlp.experts.3", "count": 3,
        "message": "gate and up differ by 25 %.", "remedy": "bring them together",
        "engines": {"vllm": "uses gate's for both"},
    }  # fmt: skip
    own.edit("doctor.json", lambda record: record.update(findings=[finding]))
    good("report", own.folder)
    section = own.page.split('<h2 id="doctor">')[1].split("<h2")[0]
    for text in ("S04", "3 places", "gate and up differ by 25 %.", "bring them together", "vLLM"):
        assert text in section
    assert "1 error" in own.page


def test_records_cannot_smuggle_markup_into_the_page(own: Recorded):
    evil = "</script><script>alert(1)</script><img src=x>"

    def rename(record: dict) -> None:
        record["passes"] = [evil]
        for layer in record["layers"]:
            layer["passes"] = {evil: layer["passes"]["data"]}

    own.edit("coverage.json", rename)
    own.edit("run.json", lambda record: record["data"]["passes"][0].update(name=evil))
    good("report", own.folder)
    page = Page(own.page)
    assert page.references == [f"#{name}" for name in SECTIONS]
    assert page.scripts == ["application/json"] * len(CHARTS) + ["javascript"] * 2


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("coverage.json", "{", "coverage.json is not the record that fourge writes"),
        ("run.json", "[]", "run.json is not the record"),
        (
            "doctor.json",
            '{"fourge": "1"}',
            "doctor.json is not the record that fourge writes there (lacks",
        ),
        ("evaluation/x.json", '{"lanes": 1}', "x.json is not the record"),
    ],
)
def test_a_damaged_record_is_refused_by_name(own: Recorded, name: str, text: str, words: str):
    (own.folder / "fourge" / name).write_text(text)
    done = run("report", own.folder)
    assert done.status == 2
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (own.folder / "fourge" / "report.html").exists()


def test_a_bf16_checkpoint_has_no_report(own: Recorded):
    done = run("report", own.source)
    assert done.status == 2
    assert "is not quantized" in done.stderr
    assert not (own.source / "fourge").exists()


def test_json_says_where_things_are(own: Recorded):
    done = run("report", own.folder, "--json")
    assert json.loads(done.stdout) == {
        "report": str(own.folder / "fourge" / "report.html"),
        "card": str(own.folder / "README.md"),
        "kept": None,
        "not_measured": [],
    }


@pytest.mark.parametrize(
    ("nats", "place"), [(0, 0), (0.001, 0), (0.01, 100 / 3), (0.1, 200 / 3), (1, 100), (7, 100)]
)
def test_the_scale_is_logarithmic_and_ends_at_its_ends(nats: float, place: float):
    assert place_on_scale(nats) == pytest.approx(place)
