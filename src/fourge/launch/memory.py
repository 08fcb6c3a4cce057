"""What lies in one GPU's memory, and how many tokens of KV cache fit into the rest.

    tokens = (memory x share - weights - activations - graphs - runtime) / bytes per token

Weights come from the checkpoint's headers, bytes per token from models/footprint.py. What an
engine takes besides was measured by others: vLLM 25.09 GiB = 432,832 tokens left on 8 RTX PRO 6000
at a share of 0.89, chunks of 8,192 and graphs of 8 (25.3 GiB by this formula); SGLang computes its
reserve itself (memory_hook.py:281-342).
"""

from dataclasses import dataclass, replace

from fourge.launch.hardware import Gpu, Hardware
from fourge.launch.served import Served, Weights
from fourge.models.config import ModelConfig
from fourge.models.footprint import cache_bytes_per_token

GIB = 1 << 30
MIB = 1 << 20
# vLLM: hidden states (BF16) that a chunk's tokens hold at once; CUDA context and NCCL buffers.
HIDDEN_STATES = 24
VLLM_RUNTIME = 1 * GIB
# Of a captured graph's batch size: 256 took about 6 GB more than 8 on 8 RTX PRO 6000.
VLLM_GRAPH = 24 * 10**6


@dataclass(frozen=True, slots=True)
class Parallel:
    """GPUs of a tensor-parallel group, of data-parallel attention (experts are then spread over
    all of them), and stages of a pipeline.
    """

    tensor: int
    data: int = 1
    pipeline: int = 1

    @property
    def gpus(self) -> int:
        return self.tensor * self.data * self.pipeline

    @property
    def spreads_experts(self) -> bool:
        return self.data > 1


@dataclass(frozen=True, slots=True)
class Load:
    """What room is made for: sequences at once, tokens drafted for each, tokens of one chunk."""

    sequences: int
    drafts: int
    chunk: int

    @property
    def graph(self) -> int:
        """The largest batch whose graph is captured: every sequence with its drafts, by eights."""
        return -(-self.sequences * (self.drafts + 1) // 8) * 8


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of one GPU. ``tokens`` fit into each replica's cache; none where it is negative."""

    total: int
    share: float
    weights: int
    mtp: int
    activations: int
    graphs: int
    runtime: int
    bytes_per_token: int

    @property
    def cache(self) -> int:
        held = self.weights + self.mtp + self.activations + self.graphs + self.runtime
        return int(self.total * self.share) - held

    @property
    def tokens(self) -> int:
        return max(0, self.cache // self.bytes_per_token)


def lay_out(
    served: Served, hardware: Hardware, engine: str, parallel: Parallel, load: Load, *, kv: str
) -> Memory:
    """The table of one GPU, the fullest one where stages of a pipeline differ."""
    config = served.config
    mtp = load.drafts > 0
    stage = -(-config.num_hidden_layers // parallel.pipeline)
    weights = per_gpu(served.weights, parallel) * stage // config.num_hidden_layers
    mtp_weights = per_gpu(served.mtp_weights, parallel) if mtp else 0
    gpu = hardware.gpu
    total = cache_bytes_per_token(config, kv, mtp=mtp)
    per_token = -(-total * stage // config.num_hidden_layers)
    if engine == "vllm":
        memory = _vllm(gpu, config, parallel, load)
    else:
        memory = _sglang(gpu, parallel, load)
    return replace(memory, weights=weights, mtp=mtp_weights, bytes_per_token=per_token)


def per_gpu(weights: Weights, parallel: Parallel) -> int:
    """Bytes on each GPU of a stage: matrices are cut by tensor parallelism, experts also spread."""
    parts = parallel.tensor * parallel.data
    return (
        -(-weights.experts // parts) + -(-weights.sharded // parallel.tensor) + weights.replicated
    )


def _vllm(gpu: Gpu, config: ModelConfig, parallel: Parallel, load: Load) -> Memory:
    logits = 2 * 4 * load.sequences * (load.drafts + 1) * config.vocab_size // parallel.tensor
    activations = HIDDEN_STATES * 2 * config.hidden_size * load.chunk + logits
    graphs = VLLM_GRAPH * load.graph
    return Memory(gpu.memory, gpu.utilization["vllm"], 0, 0, activations, graphs, VLLM_RUNTIME, 1)


def _sglang(gpu: Gpu, parallel: Parallel, load: Load) -> Memory:
    """Its reserve lies outside the share that weights and cache are given."""
    share = gpu.utilization.get("sglang")
    if share is None:
        share = sglang_share(gpu, parallel, load)
    return Memory(gpu.memory, share, 0, 0, 0, 0, 0, 1)


def sglang_share(gpu: Gpu, parallel: Parallel, load: Load) -> float:
    """The mem_fraction_static that sglang 0.5.23 chooses (memory_hook.py:281-397)."""
    reserve = 512 + 1.5 * max(load.chunk, 2048) + 1024 * parallel.gpus / 8
    reserve += 2 * load.sequences + 1.5 * 1024
    if parallel.data > 1:
        reserve += 3 * load.sequences * parallel.data
    memory = gpu.memory / MIB
    if memory > 60 * 1024:
        reserve = max(reserve, 10 * 1024)
    return round((memory - reserve) / memory, 3)
