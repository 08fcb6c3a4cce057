"""What a run will do, from headers alone: every output byte, every group of weights, every limit.

``make_plan`` lays out shards, cuts layers into groups of experts that fit the memory budget, and
adds up memory and disk. A budget that cannot work is refused (budget.py), with the smallest one
that can. Imports no torch: ``fourge plan`` answers at once.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass

from fourge.checkpoint.header import TensorInfo
from fourge.checkpoint.metadata import exclude_list, quantized_config_text
from fourge.checkpoint.names import Role, parse
from fourge.checkpoint.writer import OutTensor, ShardPlan, plan_shard
from fourge.formats.layout import packed_shape, scale_shape
from fourge.layerwise.budget import Budget, MemoryPlan, fit
from fourge.layerwise.groups import Group, by_layer, cut, measure_pieces, split_experts
from fourge.models.config import ModelConfig
from fourge.models.footprint import Load
from fourge.models.survey import Source
from fourge.models.tensors import projection_shape
from fourge.quantize.fitting import Fitting, workers_for
from fourge.quantize.memory import Workload, needs, statistics_bytes
from fourge.quantize.recipe import Recipe

# A layer whose tensors exceed this is written as several shards (the BF16 MTP layer, mostly).
MAX_SHARD_BYTES = 10 << 30


@dataclass(frozen=True)
class LayerPlan:
    """One decoder layer: its output shards and the groups in which it is read."""

    layer: int
    is_sparse: bool
    shards: tuple[ShardPlan, ...]
    groups: tuple[Group, ...]
    source_bytes: int


@dataclass(frozen=True)
class CopyPlan:
    """Tensors that go over unchanged: the embedding, the MTP layer, the final norm and lm_head."""

    title: str
    tensors: tuple[TensorInfo, ...]
    shards: tuple[ShardPlan, ...]


@dataclass(frozen=True)
class Layout:
    """All output, in the order in which it is made."""

    embedding: CopyPlan
    layers: tuple[LayerPlan, ...]
    tail: tuple[CopyPlan, ...]
    excluded: tuple[str, ...]
    config_text: str

    @property
    def shards(self) -> list[ShardPlan]:
        parts = (self.embedding, *self.layers, *self.tail)
        return [shard for part in parts for shard in part.shards]


@dataclass(frozen=True)
class Plan:
    """Everything that ``run`` needs to know before it starts."""

    source: Source
    recipe: Recipe
    workload: Workload
    layout: Layout
    memory: MemoryPlan


def make_plan(source: Source, recipe: Recipe, workload: Workload, budget: Budget) -> Plan:
    """Lay out the output and fit the run into ``budget``; BudgetError if it cannot fit."""
    layers = by_layer(source.tensors)
    decoder = range(source.config.num_hidden_layers)
    parts = [split_experts(layers[layer]) for layer in decoder]
    kept = workload.fitting.expert_bytes(source.config, itemsize=budget.itemsize)
    beside = -(
        -kept // 2
    )  # there is room for two groups of weights, and what is kept is there once
    memory = fit(measure_pieces(parts, beside), needs(source.config, workload, budget), budget)
    groups = [cut(layer, parts[layer], memory.largest_group, beside) for layer in decoder]
    layout = _layout(source, recipe, layers, groups)
    return Plan(source, recipe, workload, layout, memory)


def _layout(
    source: Source,
    recipe: Recipe,
    layers: dict[int | None, list[TensorInfo]],
    groups: list[tuple[Group, ...]],
) -> Layout:
    config = source.config
    mtp_layers = config.mtp_layers if recipe.mtp == "bf16" else range(0)
    decoder = range(config.num_hidden_layers)
    global_tensors = {parse(info.name).role: info for info in layers[None]}
    head = tuple(
        global_tensors[role] for role in (Role.FINAL_NORM, Role.LM_HEAD) if role in global_tensors
    )
    # Output tensors of each stage, in the order in which stages are made.
    stages: list[list[OutTensor]] = [_copied([global_tensors[Role.EMBEDDING]])]
    stages += [_quantized(config, layers[layer]) for layer in decoder]
    stages += [_copied(layers[layer]) for layer in mtp_layers]
    stages += [_copied(head)]
    shards = _plan_shards(stages)
    dense = [layer for layer in decoder if not config.is_sparse(layer)]
    excluded = exclude_list(dense, mtp_layers)
    return Layout(
        CopyPlan("embedding", (global_tensors[Role.EMBEDDING],), shards[0]),
        tuple(
            LayerPlan(
                layer,
                config.is_sparse(layer),
                shards[1 + layer],
                groups[layer],
                sum(info.nbytes for info in layers[layer]),
            )
            for layer in decoder
        ),
        (
            *(
                CopyPlan(f"MTP layer {layer}", tuple(layers[layer]), shards[1 + layer])
                for layer in mtp_layers
            ),
            CopyPlan("final norm and lm_head", head, shards[-1]),
        ),
        tuple(excluded),
        quantized_config_text(source.config_text, excluded, drop_mtp=recipe.mtp == "drop"),
    )


def _copied(tensors: Iterable[TensorInfo]) -> list[OutTensor]:
    return [OutTensor(info.name, info.dtype, info.shape) for info in tensors]


def _quantized(config: ModelConfig, tensors: list[TensorInfo]) -> list[OutTensor]:
    result: list[OutTensor] = []
    for info in tensors:
        parsed = parse(info.name)
        if parsed.role != Role.ROUTED_EXPERT:
            result.append(OutTensor(info.name, info.dtype, info.shape))
            continue
        assert parsed.projection is not None
        shape = projection_shape(config, parsed.projection)
        base = info.name.removesuffix("weight")
        result += [
            OutTensor(base + "weight", "U8", packed_shape(shape)),
            OutTensor(base + "weight_scale", "F8_E4M3", scale_shape(shape)),
            OutTensor(base + "weight_scale_2", "F32", ()),
            OutTensor(base + "input_scale", "F32", ()),
        ]
    return result


def _plan_shards(stages: list[list[OutTensor]]) -> list[tuple[ShardPlan, ...]]:
    """Cut stages that are too large, then number all files through."""
    pieces = [_split_at_limit(stage) for stage in stages]
    count = sum(len(stage) for stage in pieces)
    names = iter(f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1))
    return [tuple(plan_shard(next(names), piece) for piece in stage) for stage in pieces]


def _split_at_limit(tensors: list[OutTensor]) -> list[list[OutTensor]]:
    pieces: list[list[OutTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if pieces[-1] and size + tensor.nbytes > MAX_SHARD_BYTES:
            pieces.append([])
            size = 0
        pieces[-1].append(tensor)
        size += tensor.nbytes
    return pieces


def upper_workload(source: Source, recipe: Recipe, *, on_device: bool) -> Workload:
    """The largest workload that the recipe allows, for planning without its data."""
    methods = (recipe.method,)
    workers = workers_for(methods, on_device=on_device)
    tokens = sum(one.samples * one.max_tokens for one in recipe.passes)
    longest = max(one.max_tokens for one in recipe.passes)
    batch = min(max(recipe.batch_tokens, longest), tokens)
    load = Load(batch, longest)
    return Workload(tokens, len(recipe.passes), load, workers, Fitting(methods))


def disk_bytes(plan: Plan) -> tuple[int, int]:
    """Bytes that the output and the work folder will take at most."""
    config, layout, num_tokens = plan.source.config, plan.layout, plan.workload.tokens
    output = sum(shard.nbytes for shard in layout.shards)
    output += sum((plan.source.folder / path).stat().st_size for path in plan.source.other_files)
    num_sparse = sum(layer.is_sparse for layer in layout.layers)
    output += num_sparse * statistics_bytes(config, plan.workload.passes)
    row = 2 * 2 * config.hidden_size  # BF16, a layer's input and its output
    if "shared" in config.indexer_types:
        row += 2 * 4 * config.index_topk
    if any(len(layer.groups) > 1 for layer in layout.layers):
        row += 8 * config.hidden_size + 12 * config.num_experts_per_tok
    return output, num_tokens * (row + 4)


def describe(plan: Plan) -> dict:
    """What goes in and what comes out: the same for every budget and machine."""
    source, layout = plan.source, plan.layout
    roles = {str(role): {"tensors": 0, "bytes": 0} for role in Role}
    for name, info in source.tensors.items():
        entry = roles[parse(name).role]
        entry["tensors"] += 1
        entry["bytes"] += info.nbytes
    return {
        "model_type": source.config.model_type,
        "recipe": plan.recipe.name,
        "method": plan.recipe.method,
        "layers": source.config.num_hidden_layers,
        "mtp": plan.recipe.mtp if source.config.num_nextn_predict_layers else "none",
        "roles": {role: entry for role, entry in roles.items() if entry["tensors"]},
        "bytes_in": sum(info.nbytes for info in source.tensors.values()),
        "bytes_out": sum(sum(shard.sizes.values()) for shard in layout.shards),
        "shards": len(layout.shards),
        "tokens": plan.workload.tokens,
        "excluded": list(layout.excluded),
        "warnings": [*source.config.warnings, *_length_warnings(plan)],
    }


def _length_warnings(plan: Plan) -> list[str]:
    longest, most = plan.workload.load.longest, plan.source.config.max_position_embeddings
    if longest <= most:
        return []
    return [
        f"sequences of up to {longest:,} tokens go beyond the model's max_position_embeddings,"
        f" {most:,}: what it computes there is not what it was trained for; lower max_tokens"
    ]


def describe_resources(plan: Plan) -> dict:
    """Memory and disk, in bytes, and the groups that follow from them."""
    output, work = disk_bytes(plan)
    return {
        "memory": asdict(plan.memory),
        "groups_per_layer": max(len(layer.groups) for layer in plan.layout.layers),
        "disk": {"output": output, "work": work},
    }
