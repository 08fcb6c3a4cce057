"""config.json and hf_quant_config.json as ModelOpt, vLLM and SGLang need them.

The quantization block is *inserted into the text* of the source's config.json: a config that a
library parsed and wrote again has broken older servers (added, moved and dropped keys), so every
other byte stays. Both files carry the same exclude list, since engines read either
(vllm 0.33.0 transformers_utils/config.py:953-965, modelopt.py:288-405; sglang 0.5.23
modelopt_quant.py:1595-1702). Imports no torch.
"""

import json
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from fourge.checkpoint.header import INDEX_NAME
from fourge.checkpoint.writer import replacing, write_file, writing
from fourge.errors import CheckpointError, ConfigError
from fourge.formats.layout import BLOCK_SIZE

CONFIG_NAME = "config.json"
HF_QUANT_CONFIG_NAME = "hf_quant_config.json"

# Engines recognise the format by this name; the version is the one whose bytes fourge reproduces.
PRODUCER = {"name": "modelopt", "version": "0.47.0"}

# What belongs to a checkout or a download cache, not to the model.
_NOT_COPIED = {".git", ".cache", "__pycache__", "fourge"}


def exclude_list(dense_layers: Iterable[int], mtp_layers: Iterable[int]) -> list[str]:
    """The modules that are not NVFP4, so that both engines' matchers agree.

    Every layer entry ends in ``.*``: ModelOpt's own ``model.layers.1*`` would also hit layers
    10-19. The literal ``shared_experts`` is what makes SGLang keep its shared-expert fusion off,
    ``*shared_head*`` what keeps its draft head unquantized.
    """
    layers = [*dense_layers, *mtp_layers]
    return [
        "lm_head",
        "*self_attn*",
        "*mlp.shared_experts*",
        *(f"model.layers.{layer}.*" for layer in layers),
        "*shared_head*",
    ]


def quantization_config(excluded: list[str]) -> dict:
    """The flat block for config.json."""
    scheme = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": BLOCK_SIZE}
    return {
        "quant_method": "modelopt",
        "quant_algo": "NVFP4",
        "group_size": BLOCK_SIZE,
        "config_groups": {
            "group_0": {
                "input_activations": scheme,
                "weights": scheme,
                "targets": ["Linear"],
            }
        },
        "ignore": excluded,
        "producer": PRODUCER,
    }


def hf_quant_config(excluded: list[str]) -> dict:
    """The nested document; vLLM demands all three keys besides ``quant_algo``, even when null."""
    return {
        "producer": PRODUCER,
        "quantization": {
            "quant_algo": "NVFP4",
            "kv_cache_quant_algo": None,
            "group_size": BLOCK_SIZE,
            "exclude_modules": excluded,
        },
    }


def read_config(folder: Path) -> tuple[str, dict]:
    """The text and the object of ``folder``'s config.json."""
    path = folder / CONFIG_NAME
    try:
        text = path.read_bytes().decode("utf-8")  # as it is: read_text would change line ends
        raw = json.loads(text)
    except FileNotFoundError:
        raise ConfigError(f"{path} is missing; give the folder of a checkpoint.") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}.") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} holds a {type(raw).__name__}; needed is a JSON object.")
    return text, raw


def refuse_quantized(folder: Path, raw: dict) -> None:
    """Raise CheckpointError if the source is already quantized, by either metadata file."""
    found = raw.get("quantization_config") or raw.get("compression_config")
    if found:
        kind = found.get("quant_method", "unknown") if isinstance(found, dict) else found
        where = f"{folder / CONFIG_NAME} has a quantization_config (quant_method {kind})"
    elif (folder / HF_QUANT_CONFIG_NAME).exists():
        where = f"{folder / HF_QUANT_CONFIG_NAME} exists"
    else:
        return
    raise CheckpointError(
        f"the source is already quantized: {where}. Quantizing twice loses accuracy; start from the"
        " BF16 checkpoint. (If its weights are BF16 already, take that away from the metadata.)"
    )


def quantized_config_text(text: str, excluded: list[str], *, drop_mtp: bool) -> str:
    """The source's config.json with the quantization block inserted and nothing else changed.

    With ``drop_mtp``, ``num_nextn_predict_layers`` becomes 0.
    """
    return with_quantization(text, quantization_config(excluded), drop_mtp=drop_mtp)


def with_quantization(text: str, block: dict, *, drop_mtp: bool) -> str:
    """A config.json with ``block`` as its quantization_config; one that it has makes way for it."""
    wanted = {key: value for key, value in json.loads(text).items() if key != "quantization_config"}
    text = _without_member(text, "quantization_config")
    if drop_mtp and wanted.get("num_nextn_predict_layers"):
        wanted["num_nextn_predict_layers"] = 0
        text = re.sub(r'("num_nextn_predict_layers"\s*:\s*)\d+', r"\g<1>0", text)
    wanted["quantization_config"] = block
    edited = _insert_last(text, "quantization_config", block)
    if _parse_without_duplicates(edited) != wanted:
        # Duplicate keys in the source, or one of that name deeper down: the text cannot be kept.
        edited = json.dumps(wanted, indent=2, ensure_ascii=False) + "\n"
    return edited


def _without_member(text: str, key: str) -> str:
    """The text of a JSON object without its member ``key``, if that follows another."""
    found = re.search(rf',\s*"{key}"\s*:\s*', text)
    if found is None:
        return text
    _, end = json.JSONDecoder().raw_decode(text, found.end())
    return text[: found.start()] + text[end:]


def _insert_last(text: str, key: str, value: object) -> str:
    """Append a member to the outermost object of a JSON text, indented like the first member."""
    end = text.rindex("}")
    members = text[:end].rstrip()
    comma = "" if members.endswith("{") else ","
    indent_match = re.match(r"\s*\{\s*?\n([ \t]+)", text)
    if indent_match is None:
        member = f" {json.dumps(key)}: {json.dumps(value)}"
    else:
        indent = indent_match[1]
        newline = "\r\n" if "\r\n" in text else "\n"
        lines = json.dumps(value, indent=indent, ensure_ascii=False).splitlines()
        member = f"{newline}{indent}{json.dumps(key)}: {f'{newline}{indent}'.join(lines)}"
    return members + comma + member + text[len(members) :]


def _parse_without_duplicates(text: str) -> dict | None:
    """The object, or None if a key stands twice in one object."""

    def pairs(items: list[tuple[str, object]]) -> dict:
        result = dict(items)
        if len(result) != len(items):
            raise ValueError("duplicate key")
        return result

    try:
        return json.loads(text, object_pairs_hook=pairs)
    except ValueError:
        return None


def other_files(folder: Path) -> list[Path]:
    """Relative paths of the source's files that are neither weights, index nor config.json."""
    found = []
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if not path.is_file() or relative.parts[0] in _NOT_COPIED:
            continue
        replaced = relative.as_posix() in (CONFIG_NAME, INDEX_NAME, HF_QUANT_CONFIG_NAME)
        is_shard = relative.suffix == ".safetensors" and len(relative.parts) == 1
        if not replaced and not is_shard:
            found.append(relative)
    return found


def copy_files(source: Path, target: Path, files: Iterable[Path]) -> None:
    """Copy byte for byte, each under a temporary name first."""
    for relative in files:
        final = target / relative
        with writing(final):
            final.parent.mkdir(parents=True, exist_ok=True)
        with (source / relative).open("rb") as original, replacing(final) as copy:
            shutil.copyfileobj(original, copy)


def write_metadata(target: Path, config_text: str, excluded: list[str]) -> None:
    """Write both metadata files; config.json last, since its presence makes a checkpoint."""
    document = json.dumps(hf_quant_config(excluded), indent=4) + "\n"
    write_file(target / HF_QUANT_CONFIG_NAME, document.encode())
    write_file(target / CONFIG_NAME, config_text.encode())
