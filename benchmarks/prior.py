"""How strongly an expert's second moments should be drawn to its layer's, by held-out error.

    .venv/bin/python benchmarks/prior.py [--sizes 250 2000 12000 64000]
    .venv/bin/python benchmarks/prior.py --kl [--sizes 2000 12000 64000]

For each size of calibration (tokens of examples/conversations, shared evenly by its three kinds)
and strength of the prior, as multiples of the product's (calibrate/moments.py; 0: every expert by
its own tokens alone, but for those without any, which get the prior), experts of examples/tiny-glm
are quantized with local-hessian and local-hessian+descent, and what they then give for tokens of
examples/evaluation is held against what they give unquantized:

    error = sum over experts and tokens of g^2 |quantized(x) - expert(x)|^2

as a multiple of that of `max`, with inputs as they are (w4a16) and rounded to NVFP4 (w4a4). Layer
by layer; and over the layers' experts by the number of tokens that they were calibrated with, where
every expert counts with its share of the layer's error with `max`. --kl: the mean KL of whole
checkpoints instead, with the product's strength and with none, both as `fourge quantize` makes
them, where held-out tokens judge each expert against `max`, and without that judge. One thread,
float32. Prints one JSON document.
"""

import argparse
import json
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from input_scales import HOLDOUT, MODEL
from quantize_vs_modelopt import describe_run

from fourge.calibrate import moments
from fourge.calibrate.corpus import Corpus, build_corpus
from fourge.calibrate.kinds import Kind
from fourge.calibrate.moments import ExpertInputs, HeldOut, LayerInputs
from fourge.checkpoint.names import PROJECTIONS, parse
from fourge.checkpoint.source import FileReader, read_all_tensors
from fourge.evaluate import start as evaluating
from fourge.evaluate.windows import pass_specs
from fourge.layerwise.activations import make_batches
from fourge.models import layer as model
from fourge.models.linear import linear
from fourge.models.moe import Observer, Routed, inner
from fourge.models.survey import Source, survey
from fourge.quantize import judge
from fourge.quantize import start as quantizing
from fourge.quantize.methods import METHODS
from fourge.quantize.methods.expert import Expert
from fourge.quantize.recipe import NEEDS, load_recipe

CONVERSATIONS = tuple(path.replace("evaluation", "conversations") for path in HOLDOUT)
FITTED = ("local-hessian", "local-hessian+descent")
SIZES = (250, 2000, 12000, 64000)
STRENGTHS = (0.0, 0.25, 1.0, 4.0, 16.0)
LANES = judge.Errors._fields
HELD_OUT_TOKENS, HELD_OUT_CONTEXT = 32768, 256
CALIBRATION_CONTEXT = 2048
BATCH_TOKENS = 8192
# Of experts: with fewer calibration tokens than this, and at least as many as the one before.
BUCKETS = (1, 64, 256, 1024, 1 << 31)
# In place of 0 tokens: what the prior then is to an expert with a single token does not count.
NONE = 2.0**-30


def main() -> None:
    parser = argparse.ArgumentParser(description="Strengths of the prior, by held-out error.")
    parser.add_argument("--sizes", type=int, nargs="+", help="calibration tokens")
    parser.add_argument("--kl", action="store_true", help="measure whole checkpoints")
    options = parser.parse_args()
    torch.set_num_threads(1)
    report: dict[str, Any] = {
        "benchmark": "prior, whole checkpoints" if options.kl else "prior",
        **describe_run(),
        "model": MODEL.name,
        "prior_tokens": {str(kind): count for kind, count in moments.PRIOR_TOKENS.items()},
        "prior_tokens_per_column": moments.PRIOR_TOKENS_PER_COLUMN,
    }
    if options.kl:
        with tempfile.TemporaryDirectory() as name:
            sizes = options.sizes or SIZES[1:]
            report["sizes"] = [divergence(Path(name), size) for size in sizes]
    else:
        report |= expert_errors(options.sizes or SIZES)
    print(json.dumps(report, indent=2))


@contextmanager
def strength(factor: float) -> Iterator[None]:
    """Within, the prior is that many times as strong as the product's."""
    factor = factor or NONE
    tokens = {kind: factor * count for kind, count in moments.PRIOR_TOKENS.items()}
    per_column = factor * moments.PRIOR_TOKENS_PER_COLUMN
    with patch.multiple(moments, PRIOR_TOKENS=tokens, PRIOR_TOKENS_PER_COLUMN=per_column):
        yield


def gather(source: Source, data: Sequence[str], tokens: int, context: int) -> Corpus:
    specs = pass_specs(data, tokens=tokens, context=context, seed=0)
    return build_corpus(
        specs, checkpoint=MODEL, vocab_size=source.config.vocab_size, max_bad_share=0.1
    )


# ---- the unquantized model, and what its experts read


class Watch:
    """What the experts of every sparse layer read: to fit to, or (held out) the tokens as such."""

    def __init__(self, source: Source, corpus: Corpus, *, is_fitted: bool) -> None:
        config, cpu = source.config, torch.device("cpu")
        self.is_fitted = is_fitted
        layers = [n for n in range(config.num_hidden_layers) if config.is_sparse(n)]
        experts = range(config.n_routed_experts)
        self.layer = {n: LayerInputs(Kind.FULL, config, len(corpus.tokens), cpu) for n in layers}
        self.own = {(n, e): ExpertInputs(Kind.FULL, config, cpu) for n in layers for e in experts}
        self.tokens = {(n, e): HeldOut() for n in layers for e in experts}
        self.counts = dict.fromkeys(self.tokens, 0)

    def observer(self, number: int) -> Observer:
        def observe(
            expert: int, x_ND: torch.Tensor, h_NI: torch.Tensor, gate_N: torch.Tensor
        ) -> None:
            self.counts[number, expert] += len(x_ND)
            if self.is_fitted:
                self.own[number, expert].observe(x_ND, h_NI, gate_N)
                return
            tokens = self.tokens[number, expert]
            tokens.x_RD.append(x_ND.clone())
            tokens.gate_R.append(gate_N.clone())
            tokens.kept += len(x_ND)

        return observe

    def note(self, number: int, routed: Routed, start: int) -> None:
        self.layer[number].note(routed, start)


def run(source: Source, corpus: Corpus, watch: Watch) -> None:
    """All tokens through all layers, a batch at a time."""
    config, weights = source.config, weights_by_layer(source)
    lengths = corpus.lengths.tolist()
    rope = model.rope_table(config, max(lengths), torch.device("cpu"))
    for batch in make_batches(lengths, corpus.pass_of.tolist(), batch_tokens=BATCH_TOKENS):
        rows = torch.from_numpy(corpus.tokens[batch.start : batch.start + batch.tokens]).long()
        hidden, topk = weights[None]["model.embed_tokens.weight"][rows].float(), None
        for number in range(config.num_hidden_layers):
            local = weights[number]
            hidden, topk = model.attend(hidden, batch.lengths, local, config, number, rope, topk)
            if not config.is_sparse(number):
                hidden = model.dense_mlp(hidden, local, config)
                continue
            routed = model.route(hidden, local, config)
            watch.note(number, routed, batch.start)
            experts = range(config.n_routed_experts)
            model.run_experts(routed, local, experts, observe=watch.observer(number))
            hidden = routed.acc_TD


def weights_by_layer(source: Source) -> dict[int | None, dict[str, torch.Tensor]]:
    """Named relative to the layer; what belongs to none under None."""
    with FileReader(MODEL) as files:
        tensors = read_all_tensors(files, source.tensors.values())
    layers: dict[int | None, dict[str, torch.Tensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        parsed = parse(name)
        layers[parsed.layer][name if parsed.layer is None else parsed.suffix] = tensor
    return layers


# ---- errors of experts


@torch.no_grad()
def expert_errors(calibration: Sequence[int]) -> dict[str, Any]:
    source = survey(MODEL, mtp="drop")
    corpus = gather(source, HOLDOUT, HELD_OUT_TOKENS, HELD_OUT_CONTEXT)
    held_out = Watch(source, corpus, is_fitted=False)
    run(source, corpus, held_out)
    sizes = [errors_of_size(source, tokens, held_out) for tokens in calibration]
    return {
        "held_out_tokens": len(corpus.tokens),
        "sizes": [size.describe() for size in sizes],
        "by_tokens_of_expert": by_bucket(sizes),
    }


@dataclass
class Size:
    """Sums of squared errors of one size of calibration: [candidate][lane][layer, expert]."""

    calibration_tokens: int
    counts: dict[tuple[int, int], int]
    errors: dict[str, dict[str, dict[tuple[int, int], float]]] = field(default_factory=dict)

    @property
    def layers(self) -> list[int]:
        return sorted({layer for layer, _ in self.counts})

    def of_layer(self, candidate: str, lane: str, layer: int) -> float:
        own = self.errors[candidate][lane]
        return sum(error for (number, _), error in own.items() if number == layer)

    def describe(self) -> dict[str, Any]:
        counts = sorted(self.counts.values())
        return {
            "calibration_tokens": self.calibration_tokens,
            "tokens_of_experts": {
                "least": counts[0], "median": counts[len(counts) // 2], "most": counts[-1],
                "none": counts.count(0),
            },
            "times_max": {
                candidate: {
                    lane: self._over_layers(candidate, lane) for lane in LANES
                }
                for candidate in self.errors
            },
        }  # fmt: skip

    def _over_layers(self, candidate: str, lane: str) -> dict[str, Any]:
        each = {
            layer: self.of_layer(candidate, lane, layer) / self.of_layer("max", lane, layer)
            for layer in self.layers
        }
        return {"mean": sum(each.values()) / len(each), "layers": each}


def errors_of_size(source: Source, tokens: int, held_out: Watch) -> Size:
    corpus = gather(source, CONVERSATIONS, tokens, CALIBRATION_CONTEXT)
    watch = Watch(source, corpus, is_fitted=True)
    run(source, corpus, watch)
    weights = weights_by_layer(source)
    size = Size(len(corpus.tokens), watch.counts)
    size.errors = defaultdict(lambda: {lane: {} for lane in LANES})
    for (number, expert), tokens_of in held_out.tokens.items():
        if tokens_of.kept:
            own = Expert(
                "",
                *(weights[number][f"mlp.experts.{expert}.{name}.weight"] for name in PROJECTIONS),
            )
            for name, errors in errors_of_expert(own, watch, (number, expert), tokens_of).items():
                for lane in LANES:
                    size.errors[name][lane][number, expert] = getattr(errors, lane)
    return size


def errors_of_expert(
    own: Expert, watch: Watch, at: tuple[int, int], tokens: HeldOut
) -> dict[str, judge.Errors]:
    """Of every method and strength, not as a share but as the sum of squares."""
    layer, inputs = watch.layer[at[0]], watch.own[at]
    gate_up = {"gate_proj": own.gate_proj, "up_proj": own.up_proj}
    made = {"max": METHODS["max"].quantize(own, inputs.measures(Kind.NONE, layer, gate_up))}
    for factor in STRENGTHS:
        with strength(factor):
            for method in FITTED:
                measures = inputs.measures(NEEDS[method], layer, gate_up)
                made[f"{method} x{factor:g}"] = METHODS[method].quantize(own, measures)
    x_RD, gate_R = torch.cat(tokens.x_RD), torch.cat(tokens.gate_R)
    y_RD = linear(inner(x_RD, {k: v.float() for k, v in gate_up.items()}), own.down_proj.float())
    whole = float((y_RD.square().sum(-1) * gate_R.square()).sum())
    with patch.object(judge, "LEAST_TOKENS", 1):
        shares = judge.output_errors(own, made, tokens, layer.sample())
    return {name: judge.Errors(*(whole * one for one in share)) for name, share in shares.items()}


def by_bucket(sizes: Sequence[Size]) -> list[dict[str, Any]]:
    """Over all sizes, the experts that were calibrated with so many tokens."""
    rows = []
    for first, stop in zip((0, *BUCKETS[:-1]), BUCKETS, strict=True):
        chosen = [
            (size, at)
            for size in sizes
            for at, count in size.counts.items()
            if first <= count < stop and at in size.errors["max"]["w4a16"]
        ]
        if chosen:
            rows.append(
                {"tokens_from": first, "tokens_below": stop, "experts": len(chosen)}
                | {"times_max": {name: shares(chosen, name) for name in sizes[0].errors}}
            )
    return rows


def shares(chosen: Sequence[tuple[Size, tuple[int, int]]], candidate: str) -> dict[str, float]:
    found = {}
    for lane in LANES:
        ours = theirs = 0.0
        for size, at in chosen:
            unit = size.of_layer("max", lane, at[0])
            ours += size.errors[candidate][lane][at] / unit
            theirs += size.errors["max"][lane][at] / unit
        found[lane] = ours / theirs
    return found


# ---- whole checkpoints


def divergence(work: Path, tokens: int) -> dict[str, Any]:
    """Mean KL of checkpoints with the product's prior and with none, judged and not."""
    passes = tuple(pass_specs(CONVERSATIONS, tokens=tokens, context=CALIBRATION_CONTEXT, seed=0))
    recipe = replace(load_recipe("data"), passes=passes, mtp="drop")
    unjudged = {name: METHODS[name]._replace(rivals=()) for name in FITTED}
    folder, chosen = work / str(tokens), {}
    for judged in (True, False):
        for factor in (1.0, 0.0):
            label = f"x{factor:g} {'judged' if judged else 'not judged'}"
            methods = ("max", *FITTED) if label == "x1 judged" else FITTED
            places = [
                (name, folder / (name if name == "max" else f"{name} {label}")) for name in methods
            ]
            request = quantizing.Request(
                MODEL, folder, recipe, device="cpu", dtype="float32", work=folder / "work"
            )
            with strength(factor), patch.dict(METHODS, {} if judged else unjudged):
                outcomes = quantizing.run_places(
                    request, places, on_data=ignore, on_progress=ignore
                )
            for (_, place), outcome in zip(places, outcomes, strict=True):
                chosen[place.name] = outcome.record["method"]["experts"]
    return {"tokens_asked": tokens, "checkpoints": evaluate(folder, chosen)}


def ignore(*_: object) -> None:
    """Nobody watches."""


def evaluate(folder: Path, chosen: Mapping[str, Mapping[str, int]]) -> list[dict[str, Any]]:
    request = evaluating.Request(
        checkpoints=tuple(folder / name for name in chosen),
        reference=MODEL,
        data=HOLDOUT,
        lanes=LANES,
        tokens=HELD_OUT_TOKENS,
        context=HELD_OUT_CONTEXT,
        seed=0,
        device="cpu",
        work=folder / "work",
        record=folder / "evaluation",
    )
    records = evaluating.run_request(request, on_data=ignore, on_progress=ignore).records
    by_name = dict(zip(chosen, records, strict=True))
    return [
        {"checkpoint": name, "experts": chosen[name], "lanes": lanes_of(name, by_name)}
        for name in chosen
    ]


def lanes_of(name: str, records: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Mean KL, and its change in percent against max, and of a prior against none."""
    found = {}
    for lane in LANES:
        row: dict[str, Any] = {"kl_mean": records[name]["lanes"][lane]["kl_mean"]}
        others = {"against_max": "max", "against_no_prior": name.replace(" x1 ", " x0 ")}
        for key, other in others.items():
            base = records[other]["lanes"][lane]["kl_mean"]
            for pair in records[name]["paired"]:
                if other != name and pair["lane"] == lane and pair["other"] == other:
                    percent = [100 * one / base for one in (pair["difference"], *pair["interval"])]
                    row[key] = {"percent": percent[0], "interval": percent[1:]}
        found[lane] = row
    return found


if __name__ == "__main__":
    main()
