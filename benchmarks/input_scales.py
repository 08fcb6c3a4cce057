"""What calibration passes change where experts' inputs are four bits wide: their input scales.

    .venv/bin/python benchmarks/input_scales.py [--tokens 32768] [--context 256]

Quantizes examples/tiny-glm with `max`, whose codes and weight scales do not depend on data (it is
checked that all bytes but the input scales are equal), with input scales from one pass of the
recipe demo, from two, from all three, from as many tokens drawn uniformly from the vocabulary, and
from the windows of examples/evaluation that are then measured on; with headroom, and of each expert
its own. All are evaluated against BF16 in the lane w4a4, on the same windows: as engines compute
that reduce input scales to the layer's largest, and those of each expert's own as engines that do
not. Prints one JSON document: of every variant the mean KL, its change against the three passes' in
percent with the paired 95 % interval, its input scales as multiples of the three passes', and how
many of them the held-out tokens exceed, and how far: there activations saturate.

A scale that is a little larger loses nothing, but E4M3 block scales then lie elsewhere between
their eight steps to a doubling, and every block is rounded a little differently. How much that
alone does is measured with headrooms of 2^(1/8) to 2^(7/8): what passes change is something only
where it exceeds that. A headroom of a power of two changes nothing but what saturates.
"""

import argparse
import json
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from quantize_vs_modelopt import REPOSITORY, describe_run

from fourge.calibrate.corpus import PassSpec
from fourge.checkpoint.source import FileReader, read_all_tensors, tensor_bytes
from fourge.evaluate import start as evaluating
from fourge.evaluate.windows import pass_specs
from fourge.models.survey import survey_quantized
from fourge.quantize import start as quantizing
from fourge.quantize.recipe import Recipe, load_recipe
from random_checkpoint import write_input_ids

MODEL = REPOSITORY / "examples" / "tiny-glm"
HOLDOUT = tuple(
    str(REPOSITORY / "examples" / "evaluation" / f"{kind}.jsonl")
    for kind in ("coding", "broad", "deep")
)
THREE = "coding+broad+deep"
OWN_HELD_OUT = "expert, held-out windows"
LANE = "w4a4"
RANDOM_LENGTH = 512


class Variant(NamedTuple):
    """Where input scales come from: passes, and the recipe's policy and headroom."""

    passes: str = THREE
    policy: str = "layer"
    headroom: float = 1.0


VARIANTS = {
    THREE: Variant(),
    "coding": Variant("coding"),
    "coding, headroom 2": Variant("coding", headroom=2),
    "coding+broad": Variant("coding+broad"),
    "random tokens": Variant("random"),
    "random tokens, headroom 2": Variant("random", headroom=2),
    "held-out windows": Variant("held-out"),
    "headroom 4": Variant(headroom=4),
    "headroom 16": Variant(headroom=16),
    **{f"headroom 2^({step}/8)": Variant(headroom=2 ** (step / 8)) for step in range(1, 8)},
    "expert": Variant(policy="expert"),
    "expert, coding": Variant("coding", policy="expert"),
    "expert, coding, headroom 8": Variant("coding", policy="expert", headroom=8),
    "expert, random tokens": Variant("random", policy="expert"),
    OWN_HELD_OUT: Variant("held-out", policy="expert"),
    "expert, headroom 4": Variant(policy="expert", headroom=4),
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Input scales from one, two and three passes.")
    parser.add_argument("--tokens", type=int, default=32768, help="held-out tokens at most")
    parser.add_argument("--context", type=int, default=256, help="tokens of a window at most")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        report = measure(Path(name), options)
    print(json.dumps({"benchmark": "input_scales", **describe_run(), **report}, indent=2))


def measure(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    three = quantize(work, THREE, load_recipe("demo"))
    calibration = {THREE: three["data"]["tokens"]}
    passes = gather_passes(work, calibration[THREE], options)
    for name, variant in VARIANTS.items():
        if name != THREE:
            record = quantize(work, name, recipe_of(variant, passes))
            calibration[name] = record["data"]["tokens"]
    scales = compare_bytes({name: folder_of(work, name) for name in VARIANTS})
    own = [name for name, variant in VARIANTS.items() if variant.policy == "expert"]
    evaluated = {
        "layer": evaluate(work, [name for name in VARIANTS if name not in own], "layer", options),
        "expert": evaluate(work, [THREE, *own], "expert", options),
    }
    rows = []
    for served, records in evaluated.items():
        for name, record in records.items():
            if served == "layer" or name != THREE:
                rows.append(
                    {"input_scale_of": served, "variant": name, **VARIANTS[name]._asdict()}
                    | {"calibration_tokens": calibration[name]}
                    | figures(record, records[THREE])
                    | {"times_three_passes": ratios(scales[name], scales[THREE])}
                    | {"exceeded": exceeded(scales[name], scales[OWN_HELD_OUT])}
                )
    data = evaluated["layer"][THREE]["receipt"]["data"]
    holdout = {"tokens": data["tokens"], "windows": data["windows"], "context": options.context}
    return {"model": MODEL.name, "method": "max", "lane": LANE, "holdout": holdout, "rows": rows}


def gather_passes(
    work: Path, tokens: int, options: argparse.Namespace
) -> dict[str, tuple[PassSpec, ...]]:
    """By name: those of the recipe demo, ``tokens`` random ones, and what is measured on."""
    demo = {spec.name: spec for spec in load_recipe("demo").passes}
    count = tokens // RANDOM_LENGTH
    vocab = json.loads((MODEL / "config.json").read_text())["vocab_size"]
    data = write_input_ids(
        work / "random.jsonl", sequences=count, length=RANDOM_LENGTH, vocab=vocab, seed=1
    )
    drawn = PassSpec("random", (str(data),), count, RANDOM_LENGTH, RANDOM_LENGTH, seed=1)
    held_out = pass_specs(HOLDOUT, tokens=options.tokens, context=options.context, seed=0)
    return {
        "coding": (demo["coding"],),
        "coding+broad": (demo["coding"], demo["broad"]),
        THREE: tuple(demo.values()),
        "random": (drawn,),
        "held-out": tuple(held_out),
    }


def recipe_of(variant: Variant, passes: Mapping[str, tuple[PassSpec, ...]]) -> Recipe:
    return replace(
        load_recipe("demo"),
        passes=passes[variant.passes],
        input_scale=variant.policy,
        input_headroom=variant.headroom,
    )


def folder_of(work: Path, name: str) -> Path:
    """No slash in it."""
    return work / name.replace("/", ":")


def quantize(work: Path, name: str, recipe: Recipe) -> dict[str, Any]:
    request = quantizing.Request(MODEL, folder_of(work, name), recipe, device="cpu")
    return quantizing.run_request(
        request, on_data=lambda *_: None, on_progress=lambda *_: None
    ).record


def evaluate(
    work: Path, names: list[str], scales_of: str, options: argparse.Namespace
) -> dict[str, dict[str, Any]]:
    """The record of every variant, all of them paired."""
    request = evaluating.Request(
        checkpoints=tuple(folder_of(work, name) for name in names),
        reference=MODEL,
        data=HOLDOUT,
        lanes=(LANE,),
        tokens=options.tokens,
        context=options.context,
        seed=0,
        scales_of=scales_of,
        device="cpu",
        work=work / "work",
        record=work / "evaluation",
    )
    outcome = evaluating.run_request(request, on_data=lambda *_: None, on_progress=lambda *_: None)
    return dict(zip(names, outcome.records, strict=True))


def compare_bytes(folders: Mapping[str, Path]) -> dict[str, dict[str, float]]:
    """The input scales of every checkpoint, by tensor; SystemExit if anything else differs."""
    scales, first = {}, None
    for name, folder in folders.items():
        source = survey_quantized(folder, mtp=True)
        with FileReader(folder) as files:
            tensors = read_all_tensors(files, source.tensors.values())
        scales[name] = {
            key: float(value) for key, value in tensors.items() if key.endswith(".input_scale")
        }
        rest = {key: value for key, value in tensors.items() if key not in scales[name]}
        first = rest if first is None else first
        if first.keys() != rest.keys() or any(
            tensor_bytes(value) != tensor_bytes(first[key]) for key, value in rest.items()
        ):
            raise SystemExit(f"{name} differs from {THREE} in more than input scales")
    return scales


def ratios(scales: Mapping[str, float], three: Mapping[str, float]) -> dict[str, Any]:
    """Of gate and up, which share theirs, and of down."""
    found = {}
    for part, projection in (("gate_up", "gate_proj"), ("down", "down_proj")):
        values = torch.tensor(
            [value / three[key] for key, value in scales.items() if f".{projection}." in key]
        )
        found[part] = {
            "least": float(values.min()),
            "median": float(values.quantile(0.5)),
            "largest": float(values.max()),
        }
    return found


def exceeded(scales: Mapping[str, float], held_out: Mapping[str, float]) -> dict[str, Any]:
    """Scales of projections that are smaller than the expert's held-out tokens need."""
    over = [held_out[key] / value for key, value in scales.items() if value < held_out[key]]
    return {"projections": len(over), "of": len(scales), "times": max(over, default=1.0)}


def figures(record: Mapping[str, Any], three: Mapping[str, Any]) -> dict[str, Any]:
    """Mean KL, and its change against the three passes', in percent of theirs."""
    lane, base = record["lanes"][LANE], three["lanes"][LANE]["kl_mean"]
    change = [0.0, 0.0, 0.0]
    for pair in record["paired"]:
        if pair["other"] == three["receipt"]["checkpoint"]["name"]:
            change = [100 * one / base for one in (pair["difference"], *pair["interval"])]
    return {
        "kl_mean": lane["kl_mean"],
        "kl_mean_interval": lane["kl_mean_interval"],
        "change_percent": change[0],
        "change_interval": change[1:],
        "top1": lane["top1"],
    }


if __name__ == "__main__":
    main()
