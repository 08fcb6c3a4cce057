"""What the calibration saw: coverage, the largest inputs and their outliers, and the run itself."""

from collections.abc import Iterator
from statistics import median
from typing import NamedTuple

from fourge.layerwise.budget import format_bytes
from fourge.reports import charts
from fourge.reports.blocks import Block, Missing, Paragraph, Section, Table
from fourge.reports.records import Coverage, LayerCoverage, Records, Run
from fourge.reports.wording import QUANTIZE, integer, joined, plural

MOST_OUTLIERS = 10
COVERAGE_INTRO = (
    "Which experts the calibration data reached, with the router's own choices. An expert that no"
    " token reached is quantized well all the same (its weights decide that), but its input_scale"
    " is then borrowed from the others of its layer. Red: no token in that pass."
)
AMAX_INTRO = (
    "The largest absolute value that went into an expert sets its input_scale. Engines take the"
    " largest of a layer for all its experts: one outlier costs every one of them resolution in"
    " W4A4, but values beyond the scale would be cut off."
)


class Outlier(NamedTuple):
    """An amax far above the median of its layer, pass and pool."""

    ratio: float
    amax: float
    layer: int
    expert: int
    pass_name: str
    pool: str


def coverage_section(records: Records) -> Section:
    """The map, the curve, and who was never seen."""
    coverage = records.coverage
    if coverage is None or not coverage.layers:
        blocks: tuple[Block, ...] = (Missing("expert coverage", QUANTIZE),)
        return Section("coverage", "Coverage", COVERAGE_INTRO, blocks)
    found: list[Block] = [_summary(coverage), charts.coverage_maps(coverage)]
    if coverage.saturation is not None:
        found.append(charts.saturation(coverage))
    if coverage.never_seen:
        found.append(_never_seen(coverage))
    return Section("coverage", "Coverage", COVERAGE_INTRO, tuple(found))


def _summary(coverage: Coverage) -> Paragraph:
    text = (
        f"{plural(coverage.experts, 'expert')} in {plural(len(coverage.layers), 'layer')}:"
        f" {coverage.min_tokens:,} tokens for the least, {integer(coverage.median_tokens)} for the"
        f" median; {coverage.never_seen:,} never seen."
    )
    return Paragraph(text, "warn" if coverage.never_seen else "good")


def _never_seen(coverage: Coverage) -> Table:
    rows = tuple(
        (
            str(layer.layer),
            integer(len(layer.never_seen)),
            joined(map(str, layer.never_seen), most=40),
        )
        for layer in coverage.layers
        if layer.never_seen
    )
    columns = ("layer", "experts never seen", "which")
    return Table(columns, rows, "Experts that saw no token", frozenset({"which"}), folded=True)


def amax_section(records: Records) -> Section:
    """The largest inputs by layer and pass, and those that stand out."""
    coverage = records.coverage
    if coverage is None or not coverage.layers:
        blocks: tuple[Block, ...] = (Missing("the largest inputs of the experts", QUANTIZE),)
    else:
        blocks = (charts.amax_per_pass(coverage), _outlier_table(coverage))
    return Section("amax", "Largest inputs", AMAX_INTRO, blocks)


def _outlier_table(coverage: Coverage) -> Table:
    largest = sorted(_outliers(coverage), reverse=True)[:MOST_OUTLIERS]
    rows = tuple(
        (
            str(one.layer),
            str(one.expert),
            one.pass_name,
            one.pool,
            f"{one.amax:.4g}",
            f"{one.ratio:.3g} x",
        )
        for one in largest
    )
    return Table(
        ("layer", "expert", "pass", "input of", "amax", "times the layer's median"),
        rows,
        "What stands out most: the largest expert of a layer and pass",
        frozenset({"pass", "input of"}),
    )


def _outliers(coverage: Coverage) -> Iterator[Outlier]:
    """The largest expert of every layer, pass and pool."""
    for layer in coverage.layers:
        for name in coverage.passes:
            for pool, values in _pools(layer, name):
                seen = [value for value in values if value > 0]
                if seen:
                    amax = max(seen)
                    ratio = amax / median(seen)
                    yield Outlier(ratio, amax, layer.layer, values.index(amax), name, pool)


def _pools(layer: LayerCoverage, name: str) -> tuple[tuple[str, tuple[float, ...]], ...]:
    return ("gate and up", layer.gate_up_amax[name]), ("down", layer.down_amax[name])


def run_section(records: Records) -> Section:
    """How the checkpoint was made."""
    intro = "Source, data and machine of the run, as fourge/run.json has them."
    if records.run is None:
        blocks: tuple[Block, ...] = (Missing("how this checkpoint was made", QUANTIZE),)
    else:
        warnings = tuple(Paragraph(text, "warn") for text in records.run.warnings)
        blocks = (*warnings, _facts(records.run), _passes(records.run))
    return Section("run", "How it was made", intro, blocks)


def _facts(run: Run) -> Table:
    rows = (
        ("method", run.method),
        ("recipe", run.recipe),
        ("MTP layer", "left out" if run.mtp == "drop" else "BF16, untouched"),
        ("data", f"{plural(run.sequences, 'sequence')}, {run.tokens:,} tokens"),
        ("data, sha256 of the tokens", run.data_sha256),
        ("arithmetic", f"{run.dtype} on {run.device}"),
        ("time in layers", f"{run.seconds_of_layers:,.1f} s"),
        ("peak memory", format_bytes(run.peak_resident_bytes)),
        ("finished", run.finished_at),
        ("fourge", run.fourge),
        ("versions", ", ".join(f"{name} {version}" for name, version in run.versions.items())),
    )
    return Table(("run", "value"), rows, "", frozenset({"value"}))


def _passes(run: Run) -> Table:
    rows = tuple(
        (
            one.name,
            joined(one.sources),
            integer(one.sequences),
            integer(one.tokens),
            f"{one.min_tokens:,} to {one.max_tokens:,}",
            str(one.seed),
        )
        for one in run.passes
    )
    return Table(
        ("pass", "data", "sequences", "tokens", "tokens of a sequence", "seed"),
        rows,
        "Calibration passes",
        frozenset({"data"}),
    )
