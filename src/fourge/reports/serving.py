"""Commands that serve a checkpoint, for its card: only options of which the checkpoint itself
decides the value. What depends on the machine is left to the reader.
"""

from typing import NamedTuple

from fourge.reports.records import Records

# Names of the parsers of vllm 0.33.0 and sglang 0.5.23 by model_type. glm45 reads what the GLM-4.5
# to 5.x templates make of reasoning, glm47 their tool calls since 4.7.
PARSERS = {
    "glm_moe_dsa": ("glm45", "glm47"),
    "glm4_moe_lite": ("glm45", "glm47"),
}


class Command(NamedTuple):
    """How one release of an engine is started."""

    engine: str
    text: str


def serve_commands(records: Records) -> tuple[Command, ...]:
    """For vLLM and SGLang, with as many GPUs as the reader has."""
    return _vllm(records), _sglang(records)


def _vllm(records: Records) -> Command:
    lines = [f"vllm serve {records.name}", "--tensor-parallel-size 8"]
    parsers = PARSERS.get(str(records.config.get("model_type")))
    if parsers:
        lines.append(f"--reasoning-parser {parsers[0]}")
        lines.append(f"--tool-call-parser {parsers[1]} --enable-auto-tool-choice")
    if _has_mtp(records):
        lines.append('--speculative-config \'{"method": "mtp", "num_speculative_tokens": 3}\'')
    return Command("vLLM 0.33.0", _joined(lines))


def _sglang(records: Records) -> Command:
    lines = [f"python -m sglang.launch_server --model-path {records.name}", "--tp-size 8"]
    lines.append("--quantization modelopt_fp4 --disable-shared-experts-fusion")
    parsers = PARSERS.get(str(records.config.get("model_type")))
    if parsers:
        lines.append(f"--reasoning-parser {parsers[0]} --tool-call-parser {parsers[1]}")
    if _has_mtp(records):
        lines.append(
            "--speculative-algorithm NEXTN --speculative-num-steps 3 --speculative-eagle-topk 1"
            " --speculative-num-draft-tokens 4"
        )
    return Command("SGLang 0.5.23", _joined(lines))


def _joined(lines: list[str]) -> str:
    return " \\\n  ".join(lines)


def _has_mtp(records: Records) -> bool:
    return bool(records.config.get("num_nextn_predict_layers"))
