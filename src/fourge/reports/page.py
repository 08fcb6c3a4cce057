"""One self-contained HTML page of everything on record: no network, no server, no build.

plotly.js, styles and figures are all inside, about 5 MB.
"""

from pathlib import Path

import jinja2
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from fourge import __version__
from fourge.layerwise.budget import format_bytes
from fourge.reports.blocks import Section, Tile, Tone
from fourge.reports.calibration import amax_section, coverage_section, run_section
from fourge.reports.contents import doctor_section, size_section, weights_section
from fourge.reports.quality import evaluation_section
from fourge.reports.records import Records
from fourge.reports.wording import doctor_verdict, integer, kl, lane_title, percent, verdict

TEMPLATES = Path(__file__).with_name("templates")
# Of the parts of a bar, in turn; to be told apart on light and dark paper.
PALETTE = ("#8b929c", "#5c6f91", "#9a6fc4", "#3f83c8", "#3f9d73", "#8a8d3a", "#c7576b", "#5aa7b5",
           "#d5822a", "#b98bd6", "#6f8f4e", "#a5654a", "#4f6bb3", "#c2a23a")  # fmt: skip
NOT_MEASURED = "not measured"


def render_page(records: Records) -> str:
    """The page as HTML."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["safe_json"] = _safe_json
    template = environment.get_template("report.html.jinja")
    return template.render(
        name=records.name,
        subtitle=_subtitle(records),
        version=__version__,
        tiles=_tiles(records),
        sections=sections(records),
        palette=lambda number: PALETTE[number % len(PALETTE)],
        style=_text("style.css"),
        charts=_text("charts.js"),
        plotly=get_plotlyjs(),
    )


def sections(records: Records) -> tuple[Section, ...]:
    """What there is to know, the most important first."""
    return (
        evaluation_section(records),
        doctor_section(records),
        coverage_section(records),
        amax_section(records),
        weights_section(records),
        size_section(records),
        run_section(records),
    )


def _safe_json(text: str) -> Markup:
    """JSON as it may stand within a script element: nothing in it can end the element."""
    return Markup(text.replace("<", "\\u003c"))


def _text(name: str) -> str:
    return (TEMPLATES / name).read_text(encoding="utf-8")


def _subtitle(records: Records) -> str:
    parts = [str(records.config.get("model_type", "")), records.algorithm]
    if records.run is not None:
        parts.append(f"made {records.run.finished_at} with fourge {records.run.fourge}")
    return ", ".join(part for part in parts if part)


def _tiles(records: Records) -> list[Tile]:
    tiles = [_size_tile(records)]
    tiles += _evaluation_tiles(records)
    return [*tiles, _coverage_tile(records), _doctor_tile(records)]


def _size_tile(records: Records) -> Tile:
    if records.run is None:
        return Tile("size", format_bytes(records.bytes), f"in {len(records.shards)} shards")
    share = records.bytes / max(1, records.run.bytes_in)
    of = f"{percent(share, 0)} of {format_bytes(records.run.bytes_in)}"
    return Tile("size", format_bytes(records.bytes), of)


def _evaluation_tiles(records: Records) -> list[Tile]:
    if not records.evaluations:
        return [Tile("mean KL", NOT_MEASURED, "fourge evaluate", "soft")]
    latest = records.evaluations[0]
    tiles = []
    for lane in latest.lanes:
        mean, title = lane.whole.kl_mean, f"mean KL, {lane_title(lane)}"
        if mean is not None:
            agreement = f"{verdict(mean)}; top-1 {percent(lane.whole.top1, 1)}"
            tiles.append(Tile(title, kl(mean), agreement))
    return tiles


def _coverage_tile(records: Records) -> Tile:
    coverage = records.coverage
    if coverage is None:
        return Tile("coverage", NOT_MEASURED, "fourge quantize records it", "soft")
    tone: Tone = "warn" if coverage.never_seen else "good"
    seen = coverage.experts - coverage.never_seen
    detail = f"{integer(coverage.median_tokens)} tokens each (median)"
    return Tile("experts seen", f"{seen:,} of {coverage.experts:,}", detail, tone)


def _doctor_tile(records: Records) -> Tile:
    doctor = records.doctor
    if doctor is None:
        return Tile("doctor", NOT_MEASURED, "fourge doctor --record", "soft")
    tone: Tone = "bad" if doctor.of("error") else "warn" if doctor.of("warning") else "good"
    return Tile("doctor", doctor_verdict(doctor), f"{len(doctor.checked)} rules checked", tone)
