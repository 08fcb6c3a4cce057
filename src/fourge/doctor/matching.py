"""Which modules an engine leaves unquantized, by its own way of reading an exclude list.

vllm 0.33.0 modelopt.py:191-226 (is_layer_excluded), quant_utils.py:660-700 (is_layer_skipped);
sglang 0.5.23 modelopt_quant.py:309-313, 379-424 and utils.py:48-124. Simulated, not imported.
Prefixes are the names of modules at run time, where some are fused from several of the checkpoint.
"""

import re
from collections.abc import Callable, Sequence
from fnmatch import translate
from functools import cache

# Modules that an engine fuses -> the checkpoint's modules in them.
GATE_UP = ("gate_proj", "up_proj")
QKV_A = ("q_a_proj", "kv_a_proj_with_mqa")
VLLM_FUSED = {"gate_up_proj": GATE_UP, "fused_qkv_a_proj": QKV_A}
SGLANG_FUSED = {"gate_up_proj": GATE_UP, "fused_qkv_a_proj_with_mqa": QKV_A}
# In sglang an entry that ends so excludes that projection in every layer.
TAILS = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj")
EXPERTS = ".mlp.experts"


class HalfExcludedError(ValueError):
    """Of a fused module, some parts are excluded and some are not; the engine refuses to load."""


def vllm_excludes(prefix: str, entries: Sequence[str]) -> bool:
    """Whether vLLM builds the module without quantization. HalfExcludedError where it refuses."""
    head, _, tail = prefix.rpartition(".")
    if tail in VLLM_FUSED:
        parts = [f"{head}.{name}" in entries for name in VLLM_FUSED[tail]]
        if any(parts) != all(parts):
            raise HalfExcludedError(prefix)
        skipped = all(parts)
    elif "experts" in prefix:
        skipped = any("experts" in entry and prefix in entry for entry in entries)
    else:
        skipped = prefix in entries
    return skipped or any(entry in prefix or _glob(entry).match(prefix) for entry in entries)


def sglang_excludes(prefix: str, entries: Sequence[str]) -> bool:
    """Whether SGLang builds the module without quantization. HalfExcludedError as above."""
    if prefix.endswith(EXPERTS):
        return any(_matches(entry, prefix) for entry in entries)
    head, _, tail = prefix.rpartition(".")
    if tail in SGLANG_FUSED and not _sglang_linear(prefix, entries):
        parts = [_sglang_linear(f"{head}.{name}", entries) for name in SGLANG_FUSED[tail]]
        if any(parts) != all(parts):
            raise HalfExcludedError(prefix)
        return all(parts)
    return _sglang_linear(prefix, entries)


EXCLUDES: dict[str, Callable[[str, Sequence[str]], bool]] = {
    "vllm": vllm_excludes,
    "sglang": sglang_excludes,
}


def _sglang_linear(prefix: str, entries: Sequence[str]) -> bool:
    tail = prefix.rpartition(".")[2]
    return any(
        f".{entry}." in f".{prefix}."
        or _matches(entry, prefix)
        or (tail in TAILS and entry.rpartition(".")[2] == tail)
        for entry in entries
    )


def _matches(entry: str, prefix: str) -> bool:
    """The entry as a pattern, on the whole prefix or any of its parts."""
    pattern = _dotted(entry)
    return bool(pattern.fullmatch(prefix)) or any(map(pattern.fullmatch, prefix.split(".")))


@cache
def _dotted(entry: str) -> re.Pattern[str]:
    """sglang's pattern: dots are dots, a star is anything."""
    return re.compile(re.escape(entry).replace(r"\*", ".*"))


@cache
def _glob(entry: str) -> re.Pattern[str]:
    """What fnmatch makes of an entry."""
    return re.compile(translate(entry))
