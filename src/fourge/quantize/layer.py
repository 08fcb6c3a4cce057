"""One layer: all tokens through it, its experts quantized, its shards written.

Statistics and the next layer's input come from one forward pass on the unquantized weights. Under
``max`` an expert's codes depend on its weights alone, so each group of experts is quantized while
it is in memory; the input scales, shared by the layer, follow at the end.
"""

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from fourge.calibrate.corpus import Corpus
from fourge.calibrate.observe import LayerStatistics
from fourge.checkpoint.names import PROJECTIONS, Role, expert_name, parse
from fourge.checkpoint.source import check_finite, tensor_bytes
from fourge.checkpoint.writer import ShardPlan, ShardWriter, write_json
from fourge.formats import nvfp4
from fourge.layerwise.activations import Batch, LayerActivations, remove_before
from fourge.layerwise.forward import Hooks, Passage, run_group
from fourge.layerwise.groups import Group
from fourge.layerwise.machine import measure
from fourge.layerwise.progress import Progress
from fourge.models.rope import RopeTable
from fourge.quantize.methods import METHODS
from fourge.quantize.methods.expert import Expert
from fourge.quantize.plan import LayerPlan, Plan

Weights = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Job:
    """A plan with its tokens and its places."""

    plan: Plan
    corpus: Corpus
    fingerprint: dict
    out: Path
    own: Path  # fourge's records within ``out``
    work: Path
    device: torch.device
    dtype: torch.dtype  # of the computation
    began: float  # time.monotonic() when the process took the request up

    def statistics_path(self, layer: int) -> Path:
        return self.own / "statistics" / f"layer-{layer:05d}.safetensors"

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
    activations = LayerActivations(job.work, config, plan.layer, dtype=job.dtype, device=job.device)
    passage = Passage(config, rope, activations)
    work_per_token = plan.source_bytes / len(plan.groups) / job.plan.workload.tokens
    with activations, LayerWriter(job.out, plan.shards) as writer:
        for group in plan.groups:
            weights = next(stream)
            progress.advance(read=sum(info.nbytes for info in group.tensors))
            _write_unquantized(weights, writer)
            local = {parse(name).suffix: tensor for name, tensor in weights.items()}
            for batch in batches:
                run_group(passage, group, local, batch, _hooks(batch, statistics))
                progress.advance(
                    tokens=batch.tokens if group.is_last else 0, work=work_per_token * batch.tokens
                )
            _quantize_experts(job, group, weights, writer)
            progress.advance(written=writer.take_count())
        if plan.is_sparse:
            statistics.check_finite(plan.layer)
            _write_input_scales(job, plan.layer, statistics, writer)
            statistics.save(job.statistics_path(plan.layer))
        activations.commit()
        write_json(job.timing_path(plan.layer), measure(time.monotonic() - began))
        writer.commit()
    remove_before(job.work, plan.layer + 1)


def _empty_statistics(job: Job, plan: LayerPlan) -> LayerStatistics:
    config = job.plan.source.config
    return LayerStatistics.empty(
        passes=len(job.corpus.passes),
        experts=config.n_routed_experts if plan.is_sparse else 0,
        hidden=config.hidden_size,
        inner=config.moe_intermediate_size,
        device=job.device,
    )


def _hooks(batch: Batch, statistics: LayerStatistics) -> Hooks:
    return Hooks(
        observe=statistics.observer(batch.pass_index),
        routed=lambda routed: statistics.note_first_seen(routed.experts_TK, batch.start),
    )


def _write_unquantized(weights: Weights, writer: "LayerWriter") -> None:
    """Everything but the routed experts goes over byte for byte."""
    for name, tensor in weights.items():
        if parse(name).role != Role.ROUTED_EXPERT:
            check_finite(name, tensor)
            writer.write(name, tensor)


def _quantize_experts(job: Job, group: Group, weights: Weights, writer: "LayerWriter") -> None:
    """Quantize and write the experts of a group, several at a time."""
    method = METHODS[job.plan.recipe.method]

    def quantize(expert: int) -> None:
        names = [expert_name(group.layer, expert, projection) for projection in PROJECTIONS]
        prefix = names[0].removesuffix("gate_proj.weight")
        for projection, tensor in method(Expert(prefix, *(weights[name] for name in names))):
            for part, value in tensor._asdict().items():
                writer.write(f"{prefix}{projection}.{part}", value)

    with ThreadPoolExecutor(job.plan.workload.workers, thread_name_prefix="quantize") as pool:
        for _ in pool.map(quantize, group.experts):
            pass


def _write_input_scales(
    job: Job, layer: int, statistics: LayerStatistics, writer: "LayerWriter"
) -> None:
    """One input_scale for gate and up, one for down, shared by the layer's experts.

    Engines reduce to the layer's maximum anyway (vllm 0.33.0 flashinfer_fp4_moe.py:386-397), and an
    expert that saw no token is harmless so.
    """
    gate_up_amax, down_amax = statistics.layer_amax()
    gate_up, down = nvfp4.input_scale(gate_up_amax), nvfp4.input_scale(down_amax)
    for expert in range(job.plan.source.config.n_routed_experts):
        for projection in PROJECTIONS:
            scale = down if projection == "down_proj" else gate_up
            writer.write(expert_name(layer, expert, projection, "input_scale"), scale)


class LayerWriter:
    """The shards of one layer as one: a tensor goes to the shard that was planned for it."""

    def __init__(self, folder: Path, plans: Sequence[ShardPlan]) -> None:
        self._folder, self._plans = folder, plans
        self._shards: list[ShardWriter] = []
        self._by_name: dict[str, ShardWriter] = {}
        self._lock = threading.Lock()
        self._written = 0

    def __enter__(self) -> "LayerWriter":
        for plan in self._plans:
            shard = ShardWriter(self._folder, plan)
            self._shards.append(shard)
            self._by_name |= dict.fromkeys(plan.sizes, shard)
        return self

    def __exit__(self, *_: object) -> None:
        for shard in self._shards:
            shard.close()

    def write(self, name: str, tensor: torch.Tensor, offset: int = 0) -> None:
        """Write a tensor, or a part of one that begins ``offset`` bytes into it."""
        data = tensor_bytes(tensor.cpu().contiguous())
        self._by_name[name].write(name, data, offset)
        with self._lock:
            self._written += len(data)

    def take_count(self) -> int:
        """Bytes written since this was last asked."""
        with self._lock:
            count, self._written = self._written, 0
        return count

    def commit(self) -> None:
        """Give all shards their final names."""
        for shard in self._shards:
            shard.commit()
