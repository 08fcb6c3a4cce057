"""Plotly figures of recorded values. Colours are chosen to be read on light and dark paper; fonts
and grids get theirs in the browser (templates/charts.js). Zeros have no place on a log axis: they
are left out there, and said to be.
"""

import html
from collections.abc import Collection, Iterable, Mapping, Sequence
from math import log10

import numpy as np
import plotly.graph_objects as go
import plotly.io
from plotly.subplots import make_subplots

from fourge.reports.blocks import Chart
from fourge.reports.evaluations import Evaluation
from fourge.reports.records import Coverage, LayerCoverage, WeightError
from fourge.reports.wording import lane_title

PASS_COLOURS = ("#3f83c8", "#d5822a", "#3f9d73", "#9a6fc4", "#c7576b", "#8a8d3a")
LANE_COLOURS = {"w4a16": "#3f83c8", "w4a4": "#d5822a", "floor": "#8b929c"}
PROJECTION_COLOURS = {"gate_proj": "#3f83c8", "up_proj": "#3f9d73", "down_proj": "#d5822a"}
NEVER_COLOUR = "#d0342c"
TOKEN_SCALE = [[0, "#33406f"], [0.35, "#3f6f93"], [0.65, "#5fa58d"], [0.85, "#a9cf7c"],
               [1, "#f0ea8c"]]  # fmt: skip
LABEL_LENGTH = 32


def coverage_maps(coverage: Coverage) -> Chart:
    """Tokens of every expert of every layer: one map per pass, one scale of colours for all."""
    layers = [layer.layer for layer in coverage.layers]
    row_height = min(28, max(4.2, 260 / len(layers)))
    map_height = round(row_height * len(layers))
    gap, above, below = 46, 40, 48
    height = above + below + len(coverage.passes) * map_height + (len(coverage.passes) - 1) * gap
    figure = make_subplots(
        rows=len(coverage.passes),
        cols=1,
        shared_xaxes=True,
        vertical_spacing=gap / (height - above - below) if len(coverage.passes) > 1 else 0,
        subplot_titles=[f"pass {_label(name)}" for name in coverage.passes],
    )
    most = 1
    for row, name in enumerate(coverage.passes, start=1):
        tokens = _grid([layer.tokens[name] for layer in coverage.layers])
        most = max(most, int(np.nanmax(tokens)))
        _add_map(figure, tokens, layers, row)
    figure.update_yaxes(
        title_text="layer", autorange="reversed", dtick=_step(layers), showgrid=False
    )
    figure.update_xaxes(showgrid=False)
    figure.update_xaxes(title_text="expert", row=len(coverage.passes))
    powers = range(int(np.log10(most)) + 1)
    figure.update_layout(
        coloraxis={
            "colorscale": TOKEN_SCALE,
            "cmin": 0,
            "cmax": max(float(np.log10(most)), 1),
            "colorbar": {
                "title": {"text": "tokens"},
                "tickvals": list(powers),
                "ticktext": [_power(power) for power in powers],
                "thickness": 12,
                "len": min(1, 280 / height),
                "y": 1,
                "yanchor": "top",
            },
        },
        margin={"l": 52, "r": 8, "t": above, "b": below},
    )
    words = "Tokens that each expert of each layer received, as colours, one map per pass."
    return _chart("Tokens per expert, layer by layer", words, figure, height)


def _add_map(figure: go.Figure, tokens: np.ndarray, layers: Sequence[int], row: int) -> None:
    seen = np.where(tokens > 0, np.log10(np.maximum(tokens, 1)), np.nan).astype(np.float32)
    figure.add_heatmap(
        z=seen,
        y=layers,
        customdata=np.nan_to_num(tokens).astype(np.int32),
        coloraxis="coloraxis",
        hovertemplate="layer %{y}, expert %{x}: %{customdata:,} tokens<extra></extra>",
        hoverongaps=False,
        row=row,
        col=1,
    )
    if (tokens == 0).any():
        figure.add_heatmap(
            z=np.where(tokens == 0, 1.0, np.nan).astype(np.float32),
            y=layers,
            colorscale=[[0, NEVER_COLOUR], [1, NEVER_COLOUR]],
            showscale=False,
            hovertemplate="layer %{y}, expert %{x}: no token in this pass<extra></extra>",
            hoverongaps=False,
            row=row,
            col=1,
        )


def _grid(rows: Sequence[Sequence[float]]) -> np.ndarray:
    """Rows of possibly different lengths as one array, NaN where a row has ended."""
    width = max(len(row) for row in rows)
    return np.array([[*row, *[np.nan] * (width - len(row))] for row in rows], dtype=np.float64)


def _power(power: int) -> str:
    return ("1", "10", "100", "1k", "10k", "100k", "1M", "10M", "100M", "1G")[min(power, 9)]


def saturation(coverage: Coverage) -> Chart:
    """Experts that have seen a token against tokens of the corpus."""
    assert coverage.saturation is not None
    tokens, seen = coverage.saturation
    figure = go.Figure()
    figure.add_scatter(
        x=tokens,
        y=seen,
        mode="lines",
        line={"color": PASS_COLOURS[0], "width": 2.5},
        hovertemplate="after %{x:,} tokens %{y:,} experts<extra></extra>",
    )
    figure.add_hline(
        y=coverage.experts,
        line={"dash": "dot", "width": 1.5, "color": LANE_COLOURS["floor"]},
        annotation_text=f"all {coverage.experts:,} experts",
        annotation_position="bottom left",
    )
    figure.update_xaxes(type="log", title_text="tokens of the corpus, in order", dtick=1)
    figure.update_yaxes(title_text="experts seen", rangemode="tozero")
    figure.update_layout(showlegend=False)
    words = "How many experts, over all layers, had received a token after so many tokens."
    return _chart("Experts seen against tokens", words, figure, 300)


def amax_per_pass(coverage: Coverage) -> Chart:
    """Per layer and pass, the largest and the median amax over experts that saw a token."""
    titles = ("input of gate and up", "input of down")
    figure = make_subplots(
        rows=2, cols=1, shared_xaxes=True, subplot_titles=titles, vertical_spacing=0.12
    )
    layers = [layer.layer for layer in coverage.layers]
    for number, name in enumerate(coverage.passes):
        colour = PASS_COLOURS[number % len(PASS_COLOURS)]
        for row, pool in enumerate(("gate_up_amax", "down_amax"), start=1):
            values = [_positive(_amax(layer, pool)[name]) for layer in coverage.layers]
            for title, width, dash, reduce in (
                ("largest", 2.2, "solid", np.max),
                ("median", 1.4, "dot", np.median),
            ):
                figure.add_scatter(
                    x=layers,
                    y=[float(reduce(one)) if one else None for one in values],
                    name=f"{_label(name)}, {title}",
                    legendgroup=f"{number}{title}",
                    showlegend=row == 1,
                    mode=_mode(layers),
                    line={"color": colour, "width": width, "dash": dash},
                    marker={"size": 5},
                    row=row,
                    col=1,
                )
    figure.update_yaxes(type="log", title_text="amax")
    figure.update_xaxes(dtick=_step(layers))
    figure.update_xaxes(title_text="layer", row=2)
    words = "The largest absolute input of an expert: largest and median over a layer's experts."
    return _chart("Largest inputs by layer and pass", words, _with_legend(figure), 520)


def _amax(layer: LayerCoverage, pool: str) -> Mapping[str, tuple[float, ...]]:
    return layer.gate_up_amax if pool == "gate_up_amax" else layer.down_amax


def _positive(values: Iterable[float]) -> list[float]:
    return [value for value in values if value > 0]


def weight_error(errors: Sequence[WeightError]) -> Chart:
    """Relative RMS error of the weights of each layer, and of the worst expert in it."""
    figure = go.Figure()
    for projection, colour in PROJECTION_COLOURS.items():
        own = [one for one in errors if one.projection == projection]
        layers, name = [one.layer for one in own], projection.removesuffix("_proj")
        figure.add_scatter(
            x=layers,
            y=[one.relative_rms for one in own],
            name=f"{name}, layer",
            mode=_mode(layers),
            line={"color": colour, "width": 2.2},
            marker={"size": 5},
        )
        figure.add_scatter(
            x=layers,
            y=[one.worst_rms for one in own],
            name=f"{name}, worst expert",
            mode="markers",
            marker={"color": colour, "size": 7, "symbol": "line-ew-open"},
            customdata=[one.worst_expert for one in own],
            hovertemplate="%{y:.4f} (expert %{customdata})",
        )
    figure.update_xaxes(title_text="layer", dtick=_step({one.layer for one in errors}))
    figure.update_yaxes(title_text="relative RMS error")
    words = "Error of the dequantized weights against the source, by layer and projection."
    return _chart("Weights against the source", words, _with_legend(figure), 380)


def layer_errors(evaluation: Evaluation) -> Chart:
    """Relative error of the hidden state after each layer; share of tokens routed otherwise."""
    changed = any(
        value is not None for one in evaluation.layers for value in one.router_changed.values()
    )
    titles = ("error of the hidden state after the layer", "tokens routed to other experts")
    rows = 2 if changed else 1
    figure = make_subplots(
        rows=rows, cols=1, shared_xaxes=True, subplot_titles=titles[:rows], vertical_spacing=0.12
    )
    layers = [one.layer for one in evaluation.layers]
    for stream in evaluation.streams:
        figures = [
            [one.hidden_error.get(stream.name) for one in evaluation.layers],
            [one.router_changed.get(stream.name) for one in evaluation.layers],
        ]
        for row, values in enumerate(figures[:rows], start=1):
            figure.add_scatter(
                x=layers,
                y=values,
                name=lane_title(stream),
                legendgroup=stream.name,
                showlegend=row == 1,
                mode=_mode(layers),
                line={"color": LANE_COLOURS[stream.name], "width": 2},
                marker={"size": 5},
                row=row,
                col=1,
            )
    figure.update_yaxes(rangemode="tozero")
    figure.update_yaxes(tickformat=".0%", row=2)
    figure.update_xaxes(dtick=_step(layers))
    figure.update_xaxes(title_text="layer", row=rows)
    words = "How the difference from the reference grows from layer to layer, by lane."
    return _chart("From layer to layer", words, _with_legend(figure), 260 + 220 * (rows - 1))


def kl_by_position(evaluation: Evaluation) -> Chart:
    """Mean KL over the positions of each bucket, and where sparse attention begins to select."""
    figure, largest = go.Figure(), 0.0
    for stream in evaluation.streams:
        own = [one for one in stream.by_position if one.figures.kl_mean is not None]
        largest = max([largest, *(one.figures.kl_mean or 0.0 for one in own)])
        figure.add_scatter(
            x=[((one.first + 1) * (one.last + 1)) ** 0.5 for one in own],
            y=[one.figures.kl_mean for one in own],
            customdata=[[one.first, one.last, one.figures.tokens] for one in own],
            name=lane_title(stream),
            mode="lines+markers",
            line={"color": LANE_COLOURS[stream.name], "width": 2},
            marker={"size": 6},
            hovertemplate="positions %{customdata[0]} to %{customdata[1]}"
            " (%{customdata[2]:,}): %{y:.4g}",
        )
    topk = evaluation.receipt.index_topk
    if topk:
        figure.add_vline(x=topk, line={"dash": "dot", "width": 1.5, "color": LANE_COLOURS["floor"]})
        # On a log axis plotly takes values for lines, but logarithms for annotations.
        figure.add_annotation(
            x=log10(topk),
            y=1,
            yref="paper",
            text=f"index_topk {topk:,}",
            showarrow=False,
            xanchor="left" if topk < 1024 else "right",
        )
    starts = sorted({one.first for stream in evaluation.streams for one in stream.by_position})
    figure.update_xaxes(
        type="log",
        title_text="position in the window",
        tickvals=[start + 1 if start == 0 else start for start in starts],
        ticktext=[str(start) for start in starts],
    )
    figure.update_yaxes(title_text="mean KL, nats", range=[0, 1.15 * largest or 1.0])
    words = "Mean KL divergence by position in the window, for each lane and the floor."
    return _chart("KL by position", words, _with_legend(figure), 340)


def _step(layers: Collection[int]) -> int:
    """Whole layers between two ticks, so that about a dozen are named."""
    return -(-len(layers) // 12)


def _mode(points: Sequence[object]) -> str:
    return "lines+markers" if len(points) <= 24 else "lines"


def _label(name: str) -> str:
    """A name from a file: plotly would read markup in it."""
    short = name if len(name) <= LABEL_LENGTH else name[: LABEL_LENGTH - 3] + "..."
    return html.escape(short)


def _with_legend(figure: go.Figure) -> go.Figure:
    return figure.update_layout(
        legend={"orientation": "h", "x": 0, "y": 1, "yanchor": "top", "yref": "container"},
        hovermode="x unified",
    )


def _chart(title: str, words: str, figure: go.Figure, height: int) -> Chart:
    margin = {"l": 60, "r": 12, "t": 36, "b": 44} | figure.to_dict()["layout"].get("margin", {})
    figure.update_layout(template="none", height=height, margin=margin)
    figure.update_annotations(font_size=13)
    text = plotly.io.to_json(figure, validate=False)
    assert text is not None
    return Chart(title, words, text, height)
