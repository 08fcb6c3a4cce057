"""What the evaluations say, as blocks: one section of the page."""

import math

from fourge.reports import charts
from fourge.reports.blocks import Block, Mark, Missing, Paragraph, Scale, Section, Table
from fourge.reports.evaluations import LANES, Evaluation, Lane, Plain
from fourge.reports.records import Records
from fourge.reports.wording import (
    BEYOND_SCALE,
    EVALUATE,
    KL_SCALE,
    NONE,
    changed_since,
    integer,
    joined,
    kl,
    kl_interval,
    lane_title,
    percent,
    perplexity,
    verdict,
)

KL_COLUMNS = ("KL mean", "median", "p95", "p99", "max", "top-1", "ppl", "ppl of the reference")
SCALE_ENDS = (0.001, 1.0)
INTRO = (
    "KL divergence of the candidate from its BF16 reference, in nats, over the same tokens: 0 is"
    " the same model. W4A16: 4-bit weights alone, as Marlin kernels and Hopper serve it. W4A4: the"
    " experts' inputs are rounded to NVFP4 as well. The floor is the reference against itself in"
    " the candidate's arithmetic."
)


def evaluation_section(records: Records) -> Section:
    """Every evaluation on record, the latest first and in full."""
    if not records.evaluations:
        blocks: list[Block] = [Missing("KL divergence and perplexity", EVALUATE)]
        return Section("evaluation", "Evaluation", INTRO, tuple(blocks))
    latest, *older = records.evaluations
    blocks = _warnings(latest, records)
    blocks += [_scale(latest), _lanes(latest), _groups(latest), charts.kl_by_position(latest)]
    if latest.layers:
        blocks.append(charts.layer_errors(latest))
    if latest.paired:
        blocks.append(_paired(latest))
    blocks.append(_receipt(latest))
    if older:
        blocks.append(_older(older))
    return Section("evaluation", "Evaluation", INTRO, tuple(blocks))


def _warnings(evaluation: Evaluation, records: Records) -> list[Block]:
    receipt = evaluation.receipt
    told = list(receipt.warnings)
    if changed_since(receipt.files, records):
        told.append("The checkpoint has changed since this evaluation: evaluate again.")
    if receipt.overlap:
        told.append(f"The checkpoint was calibrated with {joined(receipt.overlap)} too.")
    beyond = any(lane.beyond_topk and lane.beyond_topk.tokens for lane in evaluation.lanes)
    if receipt.index_topk and not beyond:
        told.append(
            f"No position lies beyond index_topk ({receipt.index_topk:,}): sparse attention never"
            " had to select; longer data and --context would show it."
        )
    return [Paragraph(text, "warn") for text in told]


def place_on_scale(value: float) -> float:
    """Per cent of the way from 0.001 to 1 nat, logarithmically, within 0 and 100."""
    low, high = (math.log10(end) for end in SCALE_ENDS)
    clamped = min(max(value, SCALE_ENDS[0]), SCALE_ENDS[1])
    return 100 * (math.log10(clamped) - low) / (high - low)


def _scale(evaluation: Evaluation) -> Scale:
    ends = [SCALE_ENDS[0], *(bound for bound, _ in KL_SCALE), SCALE_ENDS[1]]
    words = [*(word for _, word in KL_SCALE), BEYOND_SCALE]
    places = [place_on_scale(end) for end in ends]
    bands = tuple(
        (left, right - left, word)
        for left, right, word in zip(places, places[1:], words, strict=False)
    )
    marks = tuple(_mark(lane) for lane in evaluation.lanes if lane.whole.kl_mean is not None)
    return Scale(bands, tuple(zip(places, (f"{end:g}" for end in ends), strict=True)), marks)


def _mark(lane: Lane) -> Mark:
    mean = lane.whole.kl_mean
    assert mean is not None
    interval = None
    if lane.interval is not None:
        low, high = (place_on_scale(bound) for bound in lane.interval)
        interval = (low, high - low)
    return Mark(lane_title(lane), f"{kl(mean)}, {verdict(mean)}", place_on_scale(mean), interval)


def _lanes(evaluation: Evaluation) -> Table:
    rows = tuple(
        (
            lane_title(lane),
            integer(lane.whole.tokens),
            integer(lane.windows),
            *_cells(lane.whole),
            kl_interval(lane.interval),
        )
        for lane in evaluation.streams
    )
    return Table(
        ("lane", "tokens", "windows", *KL_COLUMNS, "KL mean, 95 % by window"), rows, "By lane"
    )


def _cells(figures: Plain) -> tuple[str, ...]:
    nats = (figures.kl_mean, figures.kl_median, figures.kl_p95, figures.kl_p99, figures.kl_max)
    return (
        *map(kl, nats),
        percent(figures.top1),
        perplexity(figures.ppl_candidate),
        perplexity(figures.ppl_reference),
    )


def _groups(evaluation: Evaluation) -> Table:
    rows = []
    for lane in evaluation.lanes:
        groups = dict(lane.by_kind)
        if lane.within_topk:
            groups["positions within index_topk"] = lane.within_topk
        if lane.beyond_topk:
            groups["positions beyond index_topk"] = lane.beyond_topk
        rows += [
            (lane_title(lane), name, integer(figures.tokens), *_cells(figures))
            for name, figures in groups.items()
        ]
    return Table(
        ("lane", "of", "tokens", *KL_COLUMNS),
        tuple(rows),
        "By kind of data, and by whether sparse attention selects",
        frozenset({"of"}),
    )


def _paired(evaluation: Evaluation) -> Table:
    rows = tuple(
        (
            one.lane.upper(),
            one.other,
            f"{one.difference:+.5f}",
            f"{one.interval[0]:+.5f} to {one.interval[1]:+.5f}",
            integer(one.windows),
        )
        for one in evaluation.paired
    )
    return Table(
        ("lane", "other checkpoint", "KL minus its", "95 % by window", "windows"),
        rows,
        "Against other checkpoints, window by window",
        frozenset({"other checkpoint"}),
    )


def _receipt(evaluation: Evaluation) -> Table:
    receipt = evaluation.receipt
    kinds = (
        f"{kind.name}: {kind.windows:,} windows, {kind.tokens:,} tokens of {joined(kind.sources)}"
        for kind in receipt.kinds
    )
    rows = (
        ("record", receipt.id),
        ("finished", receipt.finished_at),
        ("reference", receipt.reference),
        ("tokens, sha256", receipt.data_sha256),
        ("data", "; ".join(kinds)),
        ("context", f"{receipt.context:,} tokens, seed {receipt.seed}"),
        (
            "arithmetic",
            f"reference {receipt.reference_dtype}, candidate {receipt.candidate_dtype}"
            f" on {receipt.device}",
        ),
        ("input_scale in W4A4", f"one per {receipt.input_scale}"),
        ("comparable with receipts of", receipt.comparable),
        ("fourge", receipt.fourge),
    )
    return Table(("receipt", "value"), rows, "Receipt", frozenset({"value"}), folded=True)


def _older(evaluations: list[Evaluation]) -> Table:
    rows = tuple(
        (
            one.receipt.finished_at,
            one.receipt.id,
            *(kl(lane.whole.kl_mean) if (lane := one.lane(name)) else NONE for name in LANES),
            integer(one.receipt.tokens),
            one.receipt.comparable[:12],
        )
        for one in evaluations
    )
    return Table(
        ("finished", "record", "KL mean, W4A16", "KL mean, W4A4", "tokens", "comparable"),
        rows,
        "Earlier evaluations",
        frozenset({"record"}),
        folded=True,
    )
