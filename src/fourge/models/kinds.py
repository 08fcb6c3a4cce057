"""Which decoder layer is what: its MLP "dense" or "sparse", its indexer "full" or "shared".

Three engines read three keys for the indexer in three orders (transformers 5.23 and sglang 0.5.23:
indexer_types, then index_topk_pattern, then freq/offset; vllm 0.33: the last two only), so a file
whose keys contradict each other is an error here. Imports no torch.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from fourge.errors import ConfigError
from fourge.models.fields import integer, refused, strings

Kinds = tuple[str, ...]


def mlp_types(raw: Mapping[str, Any], num_layers: int) -> Kinds:
    """ "dense" or "sparse" per layer, from mlp_layer_types, else from first_k_dense_replace.

    transformers 5.23 saves its default first_k_dense_replace beside the mlp_layer_types that it was
    given and reads the latter alone, so a contradiction is no error: see mlp_contradiction.
    """
    types = strings(raw, "mlp_layer_types")
    if types is not None:
        return _per_layer(types, num_layers, "mlp_layer_types", "dense sparse")
    if raw.get("first_k_dense_replace") is None:
        raise refused("first_k_dense_replace", None, "the number of dense layers")
    return _first_dense(raw, num_layers)


def mlp_contradiction(raw: Mapping[str, Any], num_layers: int) -> str | None:
    """A sentence for the user where the two keys differ: engines read first_k_dense_replace."""
    if raw.get("mlp_layer_types") is None or raw.get("first_k_dense_replace") is None:
        return None
    if mlp_types(raw, num_layers) == _first_dense(raw, num_layers):
        return None
    return (
        f"config.json contradicts itself: first_k_dense_replace {raw['first_k_dense_replace']} does"
        " not fit mlp_layer_types, which was followed; vLLM and SGLang read the former and will not"
        " load this model until it is corrected"
    )


def _first_dense(raw: Mapping[str, Any], num_layers: int) -> Kinds:
    num_dense = min(integer(raw, "first_k_dense_replace", minimum=0), num_layers)
    return ("dense",) * num_dense + ("sparse",) * (num_layers - num_dense)


def indexer_types(raw: Mapping[str, Any], num_layers: int) -> Kinds:
    """ "full" or "shared" per layer; all "full" when no key says anything."""
    found: dict[str, Kinds] = {}
    types = strings(raw, "indexer_types")
    if types is not None:
        found["indexer_types"] = _per_layer(types, num_layers, "indexer_types", "full shared")
    if raw.get("index_topk_pattern") is not None:
        found["index_topk_pattern"] = _pattern(raw["index_topk_pattern"], num_layers)
    if raw.get("index_topk_freq") is not None:
        freq = integer(raw, "index_topk_freq")
        offset = integer(raw, "index_skip_topk_offset", minimum=0, default=2)
        found["index_topk_freq"] = tuple(
            "shared" if max(layer - offset + 1, 0) % freq else "full" for layer in range(num_layers)
        )
    resolved = _agreed(found)
    if resolved is None:
        return ("full",) * num_layers
    if resolved[0] != "full":
        key = next(iter(found))
        raise refused(
            key, raw[key], "a first layer with its own indexer: none comes before it to share"
        )
    return resolved


def _pattern(pattern: object, num_layers: int) -> Kinds:
    letters = list(pattern) if isinstance(pattern, str | list) else []
    if (
        any(letter not in ("F", "S") for letter in letters)
        or len(letters) not in (num_layers, num_layers + 1)
        # One more stands for the MTP layer, which always has an indexer of its own.
        or letters[num_layers:] not in ([], ["F"])
    ):
        raise refused(
            "index_topk_pattern", pattern, f"{num_layers} letters F or S, or one more that is F"
        )
    return tuple("full" if letter == "F" else "shared" for letter in letters[:num_layers])


def _per_layer(types: Sequence[str], count: int, key: str, names: str) -> Kinds:
    if len(types) != count or not set(types) <= set(names.split()):
        raise refused(key, types, f"{count} entries of {names.replace(' ', ' or ')}")
    return tuple(types)


def _agreed(found: Mapping[str, Kinds]) -> Kinds | None:
    """What every key in ``found`` says; None if there is no key."""
    if not found:
        return None
    (key, types), *others = found.items()
    for other_key, other_types in others:
        for layer, (kind, other_kind) in enumerate(zip(types, other_types, strict=True)):
            if kind != other_kind:
                raise ConfigError(
                    f"config.json contradicts itself: {key} makes layer {layer} {kind!r} and"
                    f" {other_key} makes it {other_kind!r}; engines differ in which key they read:"
                    " keep the key that matches the tensors and remove the other."
                )
    return types
