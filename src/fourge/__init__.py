"""fourge makes, proves and serves NVFP4 checkpoints of very large Mixture-of-Experts models.

    from fourge import LLM, SamplingParams
    LLM("examples/tiny-glm").generate(["def main("], SamplingParams(temperature=0))

These names are loaded when they are first used: the command line needs none of them.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fourge.engine.params import SamplingParams, StructuredOutputs
    from fourge.llm import LLM, Completion

__version__ = "0.1.0"
__all__ = ["LLM", "Completion", "SamplingParams", "StructuredOutputs", "__version__"]


def __getattr__(name: str) -> Any:
    if name in ("LLM", "Completion"):
        from fourge import llm

        return getattr(llm, name)
    if name in ("SamplingParams", "StructuredOutputs"):
        from fourge.engine import params

        return getattr(params, name)
    raise AttributeError(f"module 'fourge' has no attribute {name!r}")
