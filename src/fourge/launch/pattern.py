"""The index pattern: which layers select tokens themselves (F) and which reuse the last selection.

A community trade of quality for speed (IndexCache, arXiv 2603.12201), no part of GLM-5.1's
training; so it is off unless asked for, and refused where the model was trained with a sharing of
its own. vllm 0.33.0 reads ``index_topk_pattern`` alone (deepseek_v32/attention.py:167-177); sglang
0.5.23 reads ``indexer_types`` first, which transformers has filled in by then, so that an override
of the pattern alone does nothing (model_config.py:488-506). Both keys are written for both.
"""

from collections.abc import Mapping
from typing import Any

from fourge.errors import LaunchError
from fourge.models.kinds import indexer_types

# Of the model card; searched for GLM-5 (THUDM/IndexCache).
KNOWN = "FFSFSSSFSSFFFSSSFFFSFSSSSSSFFSFFSFFSSFFFFFFSFFFFFSFFSSSSSSFSFFFSFSSSFSFFSFFSSS"
GLM_LAYERS = len(KNOWN)


def fault(pattern: object, num_layers: int = GLM_LAYERS) -> str | None:
    """What is wrong with ``pattern`` for a model of ``num_layers`` layers; None if nothing is."""
    if not isinstance(pattern, str):
        return f"it is a {type(pattern).__name__}; needed is a string of letters F and S"
    strange = sorted(set(pattern) - {"F", "S"})
    if strange:
        return f"it holds {strange[0]!r}; only F and S are letters of it"
    if len(pattern) not in (num_layers, num_layers + 1):
        return (
            f"it has {len(pattern)} letters; needed are {num_layers}, one per layer, or"
            f" {num_layers + 1} with an F for the MTP layer"
        )
    if pattern[num_layers:] not in ("", "F"):
        return "its last letter is S; it stands for the MTP layer, which has an indexer of its own"
    if pattern[0] != "F":
        return "its first letter is S; no layer comes before the first whose selection it could use"
    return None


def trained(raw: Mapping[str, Any]) -> str | None:
    """The key of config.json by which the model was trained with shared indexers, or None."""
    types = raw.get("indexer_types")
    if types is not None and "shared" in types:
        return "indexer_types"
    if (raw.get("index_topk_freq") or 1) > 1:
        return "index_topk_freq"
    if "S" in (raw.get("index_topk_pattern") or ""):
        return "index_topk_pattern"
    return None


def layer_kinds(pattern: str, raw: Mapping[str, Any], num_layers: int) -> tuple[str, ...]:
    """ "full" or "shared" per layer. Raises LaunchError where the pattern cannot be used."""
    key = trained(raw)
    if key is not None:
        raise LaunchError(
            f"config.json has {key}: this model was trained with shared indexers and stores no"
            " others, so another pattern would compute with missing weights; leave out"
            " --index-pattern."
        )
    found = fault(pattern, num_layers)
    if found is not None:
        raise LaunchError(f"--index-pattern {pattern} cannot be used: {found}.")
    return indexer_types({"index_topk_pattern": pattern}, num_layers)


def override(pattern: str, num_layers: int = GLM_LAYERS) -> dict[str, Any]:
    """The keys that put ``pattern`` into force in either engine, one letter per decoder layer."""
    letters = pattern[:num_layers]
    return {
        "index_topk_pattern": letters,
        "indexer_types": ["full" if letter == "F" else "shared" for letter in letters],
    }
