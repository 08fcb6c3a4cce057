"""The releases that plans are made for, and what of them several modules need."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Release:
    """An engine's version, its image, and the program inside it."""

    version: str
    image: str
    program: tuple[str, ...]


RELEASES = {
    "vllm": Release("0.33.0", "vllm/vllm-openai:v0.33.0", ("vllm", "serve")),
    "sglang": Release(
        "0.5.23", "lmsysorg/sglang:v0.5.23", ("python3", "-m", "sglang.launch_server")
    ),
}
# What vLLM's sparse attention for SM12x is compiled for (v1/attention/backends/mla/
# flashinfer_mla_sparse.py:230-238).
SM120_INDEX_TOPK = 2048
