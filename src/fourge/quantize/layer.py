"""One layer: all tokens through it, its experts quantized, its shards written.

Statistics and the next layer's input come from one forward pass on the unquantized weights. When
all tokens have been through a group of experts, all that these experts' codes depend on is known,
and they are quantized while they are in memory; the input scales follow at the end, since they may
be shared by the layer.
"""

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from fourge.calibrate.corpus import Corpus
from fourge.calibrate.observe import LayerStatistics
from fourge.checkpoint.names import PROJECTIONS, Role, expert_name, parse
from fourge.checkpoint.source import check_finite
from fourge.checkpoint.writer import write_json
from fourge.formats import nvfp4
from fourge.layerwise.activations import Batch, LayerActivations, remove_before
from fourge.layerwise.folders import OWN_FOLDER
from fourge.layerwise.forward import Hooks, Passage, run_group
from fourge.layerwise.groups import Group
from fourge.layerwise.machine import measure
from fourge.layerwise.progress import Progress
from fourge.models.moe import Routed
from fourge.models.rope import RopeTable
from fourge.quantize.experts import Choice, Inputs, Known
from fourge.quantize.judge import Errors
from fourge.quantize.plan import LayerPlan, Plan
from fourge.quantize.writers import LayerWriter, open_writers

Weights = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Target:
    """One output: the method of its experts, and its folder."""

    method: str
    out: Path
    fingerprint: dict

    @property
    def own(self) -> Path:
        """fourge's records within ``out``."""
        return self.out / OWN_FOLDER

    def statistics_path(self, layer: int) -> Path:
        return self.own / "statistics" / f"layer-{layer:05d}.safetensors"

    def choices_path(self, layer: int) -> Path:
        return self.own / "statistics" / f"choices-{layer:05d}.json"


@dataclass(frozen=True)
class Job:
    """A plan with its tokens and its places."""

    plan: Plan
    corpus: Corpus
    targets: tuple[Target, ...]
    work: Path
    device: torch.device
    dtype: torch.dtype  # of the computation
    began: float  # time.monotonic() when the process took the request up

    @property
    def methods(self) -> tuple[str, ...]:
        return tuple(target.method for target in self.targets)

    @property
    def outs(self) -> list[Path]:
        return [target.out for target in self.targets]

    def timing_path(self, layer: int) -> Path:
        return self.work / f"timing-{layer:05d}.json"


def run_layer(
    job: Job,
    plan: LayerPlan,
    stream: Iterator[Weights],
    batches: list[Batch],
    rope: RopeTable,
    progress: Progress,
) -> None:
    """Do one layer and commit it; ``stream`` yields the tensors of its groups in order."""
    began = time.monotonic()
    config = job.plan.source.config
    statistics = _empty_statistics(job, plan)
    fitting = job.plan.workload.fitting
    inputs = Inputs(fitting, config, len(job.corpus.tokens), job.device)
    activations = LayerActivations(job.work, config, plan.layer, dtype=job.dtype, device=job.device)
    passage = Passage(config, rope, activations)
    work_per_token = plan.source_bytes / len(plan.groups) / job.plan.workload.tokens
    made = Made(job.methods)
    with activations, open_writers(job.outs, plan.shards) as writers:
        for group in plan.groups:
            weights = next(stream)
            progress.advance(read=sum(info.nbytes for info in group.tensors))
            _write_unquantized(weights, writers)
            local = {parse(name).suffix: tensor for name, tensor in weights.items()}
            inputs.begin(group)
            for batch in batches:
                run_group(passage, group, local, batch, _hooks(batch, statistics, inputs))
                progress.advance(
                    tokens=batch.tokens if group.is_last else 0, work=work_per_token * batch.tokens
                )
            for choices, seconds in _quantize_experts(job, group, weights, inputs, writers):
                made.add(choices, seconds)
                progress.advance(written=sum(writer.take_count() for writer in writers))
            progress.advance(written=sum(writer.take_count() for writer in writers))
        if plan.is_sparse:
            statistics.check_finite(plan.layer)
            scales = _input_scales(job, statistics)
            for target, writer in zip(job.targets, writers, strict=True):
                _write_input_scales(plan.layer, scales, writer)
                statistics.save(target.statistics_path(plan.layer))
                write_json(target.choices_path(plan.layer), made.record(target.method))
        activations.commit()
        timing = measure(time.monotonic() - began) | {"quantizing_seconds": dict(made.seconds)}
        write_json(job.timing_path(plan.layer), timing)
        for writer in writers:
            writer.commit()
    remove_before(job.work, plan.layer + 1)


class Made:
    """What was chosen for the experts of a layer so far, and what every method took: seconds of one
    thread, those of rivals included.
    """

    def __init__(self, methods: Sequence[str]) -> None:
        self._choices: dict[str, list[Choice]] = {method: [] for method in methods}
        self.seconds: Counter[str] = Counter()

    def add(self, choices: Mapping[str, Choice], seconds: Mapping[str, float]) -> None:
        """The next expert's."""
        for method, choice in choices.items():
            self._choices[method].append(choice)
        self.seconds.update(seconds)

    def record(self, method: str) -> dict:
        """The JSON record of one target: per expert, in expert order."""
        choices = self._choices[method]
        return {
            "method": method,
            "chosen": [choice.method for choice in choices],
            "errors": {
                name: {
                    lane: [getattr(choice.errors[name], lane) for choice in choices]
                    for lane in Errors._fields
                }
                for name in (choices[0].errors if choices else ())
            },
        }


def _empty_statistics(job: Job, plan: LayerPlan) -> LayerStatistics:
    config = job.plan.source.config
    return LayerStatistics.empty(
        passes=len(job.corpus.passes),
        experts=config.n_routed_experts if plan.is_sparse else 0,
        hidden=config.hidden_size,
        inner=config.moe_intermediate_size,
        device=job.device,
    )


def _hooks(batch: Batch, statistics: LayerStatistics, inputs: Inputs) -> Hooks:
    def note(routed: Routed) -> None:
        statistics.note_first_seen(routed.experts_TK, batch.start)
        inputs.note(routed, batch.start)

    return Hooks(observe=inputs.observer(statistics.observer(batch.pass_index)), routed=note)


def _write_unquantized(weights: Weights, writers: Sequence[LayerWriter]) -> None:
    """Everything but the routed experts goes over byte for byte."""
    for name, tensor in weights.items():
        if parse(name).role != Role.ROUTED_EXPERT:
            check_finite(name, tensor)
            for writer in writers:
                writer.write(name, tensor)


def _quantize_experts(
    job: Job, group: Group, weights: Weights, inputs: Inputs, writers: Sequence[LayerWriter]
) -> Iterator[tuple[dict[str, Choice], dict[str, float]]]:
    """Quantize and write the experts of a group, several at a time. Yields, for each in order, what
    was chosen for every target, and the seconds that every method took.
    """

    def quantize(expert: int) -> tuple[dict[str, Choice], dict[str, float]]:
        known, choices = Known(), {}
        for target, writer in zip(job.targets, writers, strict=True):
            found, choice = inputs.quantize(group, weights, expert, target.method, known)
            choices[target.method] = choice
            for projection, tensor in found.items():
                for part, value in tensor._asdict().items():
                    writer.write(expert_name(group.layer, expert, projection, part), value)
        return choices, known.seconds

    with ThreadPoolExecutor(job.plan.workload.workers, thread_name_prefix="quantize") as pool:
        yield from pool.map(quantize, group.experts)


def _input_scales(job: Job, statistics: LayerStatistics) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Of each expert, the ``input_scale`` of gate and up, and of down.

    "layer": the layer's largest activation for all, which is what engines reduce to anyway (vllm
    0.33.0 flashinfer_fp4_moe.py:386-397); so an expert that saw no token is harmless. "expert":
    each its own, which engines that do not reduce can use; one that saw no token gets the layer's.
    """
    recipe, layer_amax = job.plan.recipe, statistics.layer_amax()
    amax_E2 = torch.stack([statistics.gate_up_amax.amax(0), statistics.down_amax.amax(0)], -1)
    results = []
    for own in amax_E2.tolist():
        seen = recipe.input_scale == "expert" and min(own) > 0
        gate_up, down = own if seen else layer_amax
        results.append(
            (
                nvfp4.input_scale(gate_up * recipe.input_headroom),
                nvfp4.input_scale(down * recipe.input_headroom),
            )
        )
    return results


def _write_input_scales(
    layer: int, scales: Sequence[tuple[torch.Tensor, torch.Tensor]], writer: LayerWriter
) -> None:
    for expert, (gate_up, down) in enumerate(scales):
        for projection in PROJECTIONS:
            scale = down if projection == "down_proj" else gate_up
            writer.write(expert_name(layer, expert, projection, "input_scale"), scale)
