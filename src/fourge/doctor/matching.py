"""Which modules an engine leaves unquantized, by its own way of reading the exclude list.

vllm 0.33.0 modelopt.py:191-226 (is_layer_excluded) with quant_utils.py:684-688 for experts;
sglang 0.5.23 modelopt_quant.py:309-313, 379-424 and utils.py:48-124. Simulated, not imported.
"""

import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch

# Modules that the engines fuse -> the checkpoint's modules in them.
FUSED = {
    "gate_up_proj": ("gate_proj", "up_proj"),
    "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
    "fused_qkv_a_proj_with_mqa": ("q_a_proj", "kv_a_proj_with_mqa"),
}
# An entry that ends so excludes that projection in every layer in sglang.
TAILS = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj")


class HalfExcluded(ValueError):
    """Of a fused module, some parts are excluded and some are not; engines refuse to load."""


def vllm_excludes(prefix: str, entries: Sequence[str], fused: Mapping = FUSED) -> bool:
    """Whether vLLM builds the module ``prefix`` without quantization."""
    head, _, tail = prefix.rpartition(".")
    if tail in fused and "experts" not in head.rpartition(".")[2]:
        parts = [f"{head}.{name}" for name in fused[tail]]
        exact = [part in entries for part in parts]
        if any(exact) and not all(exact):
            raise HalfExcluded(prefix)
        if all(exact):
            return True
    elif prefix in entries:
        return True
    if "experts" in prefix and any("experts" in entry and prefix in entry for entry in entries):
        return True
    return any(entry in prefix or fnmatch(prefix, entry) for entry in entries)


def sglang_excludes(prefix: str, entries: Sequence[str], fused: Mapping = FUSED) -> bool:
    """Whether SGLang builds the module ``prefix`` without quantization."""
    if prefix.endswith(".experts"):
        return any(_pattern(entry).fullmatch(prefix) for entry in entries)
    head, _, tail = prefix.rpartition(".")
    if tail in fused:
        answers = [_sglang_linear(f"{head}.{name}", entries) for name in fused[tail]]
        answers = [answer or _sglang_linear(prefix, entries) for answer in answers]
        if any(answers) and not all(answers):
            raise HalfExcluded(prefix)
        return all(answers)
    return _sglang_linear(prefix, entries)


def _sglang_linear(prefix: str, entries: Sequence[str]) -> bool:
    parts = prefix.split(".")
    for entry in entries:
        if f".{entry}." in f".{prefix}.":
            return True
        pattern = _pattern(entry)
        if pattern.fullmatch(prefix) or any(pattern.fullmatch(part) for part in parts):
            return True
        if parts[-1] in TAILS and entry.endswith(parts[-1]):
            return True
    return False


def _pattern(entry: str) -> re.Pattern:
    return re.compile(re.escape(entry).replace(r"\*", ".*"))


EXCLUDES = {"vllm": vllm_excludes, "sglang": sglang_excludes}
