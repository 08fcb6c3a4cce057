"""The files beside the weights: tokenizer, template, generation config, model card.

Rules K11, K13, K14, C07, C08 and C11. Ids of special tokens come from tokenizer.json; what only GLM
has is looked for only where its tokens are. Imports no torch.
"""

import re
from collections.abc import Iterator

from fourge.checkpoint.metadata import CONFIG_NAME
from fourge.doctor.correction import key_of, list_values
from fourge.doctor.evidence import MODEL_CARD, Evidence, JsonObject
from fourge.doctor.findings import Finding, found

RULES = ("K11", "K14", "C07", "C08", "C11")
GENERATION_NAME, TOKENIZER_NAME = "generation_config.json", "tokenizer.json"
TOKENIZER_CONFIG_NAME = "tokenizer_config.json"
TEMPLATE_NAME = "chat_template.jinja"
LEAST_VOCABULARY = 1024
TOKENIZERS = (TOKENIZER_NAME, "tokenizer.model", "vocab.json", "tiktoken.model")
# What ends a turn, by the token's text (GLM-4.5 and later).
STOPS = ("<|endoftext|>", "<|user|>", "<|observation|>")
# Ids of GLM-4.5 and later, whose vocabulary has 154,880 rows.
GLM_VOCABULARY = 154_880
GLM_IDS = {
    "<|endoftext|>": 154820, "<|user|>": 154827, "<|assistant|>": 154828,
    "<|observation|>": 154829, "<think>": 154841, "</think>": 154842, "<tool_call>": 154843,
    "</tool_call>": 154844, "<arg_key>": 154847, "</arg_key>": 154848, "<arg_value>": 154849,
    "</arg_value>": 154850,
}  # fmt: skip
# GLM-5.2 and later: sharing of selections, or this base; their templates know reasoning_effort.
LATER_THETA = 8_000_000
LATER_TEMPLATE = "reasoning_effort"
# "dense layers 0-2", "layers 0 to 2 are dense"
LAYERS = r"\blayers?\s+(\d+)\s*(?:-|--|to|\u2013)\s*(\d+)"
DENSE_CLAIM = re.compile(
    rf"\bdense\b[^.\n]{{0,24}}?{LAYERS}|{LAYERS}[^.\n]{{0,24}}?\bdense\b", re.IGNORECASE
)
FP8_BASE = re.compile(
    r"^base_model:\s*(?:\n\s*-\s*)?[\"']?(\S+fp8\S*)", re.IGNORECASE | re.MULTILINE
)


def needs_no_tokenizer(evidence: Evidence) -> bool:
    """Whether this is a model for tests, whose vocabulary is too small for a tokenizer (or not
    known) and that has none of its files: K13 has nothing to say then.
    """
    names = (*TOKENIZERS, TOKENIZER_CONFIG_NAME, GENERATION_NAME, TEMPLATE_NAME)
    places = [evidence] + ([evidence.source] if evidence.source else [])
    vocabulary = evidence.raw.get("vocab_size")
    is_small = not isinstance(vocabulary, int) or vocabulary < LEAST_VOCABULARY
    return is_small and not any(name in place.files.sizes for place in places for name in names)


def check_companions(evidence: Evidence) -> Iterator[Finding]:
    """All of RULES, and K13."""
    if not needs_no_tokenizer(evidence):
        yield from _missing(evidence)
    yield from _stops(evidence)
    yield from _template(evidence)
    yield from _token_ids(evidence)
    yield from _provenance(evidence)
    yield from _dense_layers(evidence)


def _missing(evidence: Evidence) -> Iterator[Finding]:
    """K13."""
    sizes = evidence.files.sizes
    missing = [] if any(name in sizes for name in TOKENIZERS) else [TOKENIZER_NAME]
    missing += [name for name in (TOKENIZER_CONFIG_NAME, GENERATION_NAME) if name not in sizes]
    if not template_of(evidence):
        missing.append(TEMPLATE_NAME)
    if evidence.source is not None:
        missing = [name for name in missing if _has(evidence.source, name)]
    if missing:
        yield found("K13", missing, f"{list_values(missing)} not there.")
    broken = {
        name: problem
        for name in (TOKENIZER_NAME, TOKENIZER_CONFIG_NAME, GENERATION_NAME)
        if name in sizes and (problem := evidence.json_problem(name)) is not None
    }
    if broken:
        told = "; ".join(f"{name} cannot be used: {problem}" for name, problem in broken.items())
        yield found("K13", list(broken), f"{told}.", severity="error")


def _has(source: Evidence, name: str) -> bool:
    return bool(template_of(source)) if name == TEMPLATE_NAME else name in source.files.sizes


def template_of(evidence: Evidence) -> str:
    """The chat template, from its own file or the tokenizer's config; empty without one."""
    own = evidence.text(TEMPLATE_NAME)
    inside = (evidence.json_file(TOKENIZER_CONFIG_NAME) or {}).get("chat_template")
    return own or (inside if isinstance(inside, str) else str(inside or ""))


def _stops(evidence: Evidence) -> Iterator[Finding]:
    """C07: the ids that end a turn, in both files that engines read."""
    documents = {CONFIG_NAME: evidence.raw, GENERATION_NAME: evidence.json_file(GENERATION_NAME)}
    lacking = {
        key_of("eos_token_id", file): missing
        for file, document in documents.items()
        if document and (missing := _lacking_stops(evidence, document, file))
    }
    if lacking:
        told = "; ".join(f"{where} lacks {list_values(ids)}" for where, ids in lacking.items())
        yield found("C07", list(lacking), f"{told}: turns would not end.")


def _lacking_stops(evidence: Evidence, document: JsonObject, file: str) -> list[str]:
    value = document.get("eos_token_id")
    ids = value if isinstance(value, list) else [value]
    tokens = evidence.special_tokens
    if all(name in tokens for name in STOPS):
        return [f"{tokens[name]} ({name})" for name in STOPS if tokens[name] not in ids]
    source = evidence.source
    theirs = (source.json_file(file) or {}).get("eos_token_id") if source is not None else None
    wanted = theirs if isinstance(theirs, list) else [theirs]
    return [str(id) for id in wanted if id is not None and id not in ids]


def _template(evidence: Evidence) -> Iterator[Finding]:
    """C08."""
    template, source = template_of(evidence), evidence.source
    different = []
    if source is not None:
        if template and template_of(source) and template != template_of(source):
            different.append(TEMPLATE_NAME)
        ours, theirs = evidence.json_file(GENERATION_NAME), source.json_file(GENERATION_NAME)
        if ours and theirs and _without_stops(ours) != _without_stops(theirs):
            different.append(GENERATION_NAME)
        if different:
            yield found("C08", different, f"{list_values(different)} differ from the source's.")
        return
    config = evidence.config
    if config is None or config.model_type != "glm_moe_dsa" or not template:
        return
    is_later = config.rope.theta == LATER_THETA or "shared" in config.indexer_types
    if is_later != (LATER_TEMPLATE in template) and config.vocab_size == GLM_VOCABULARY:
        model, other = ("GLM-5.2 or later", "before") if is_later else ("GLM-5.1", "after")
        message = f"the template is of a release {other} this model's ({model})."
        yield found("C08", TEMPLATE_NAME, message)


def _without_stops(document: JsonObject) -> JsonObject:
    return {key: value for key, value in document.items() if key != "eos_token_id"}


def _token_ids(evidence: Evidence) -> Iterator[Finding]:
    """C11: against the source, the family, and the vocabulary."""
    tokens, config, source = evidence.special_tokens, evidence.config, evidence.source
    if config is None or not tokens:
        return
    wanted = source.special_tokens if source is not None else {}
    if not wanted and config.vocab_size == GLM_VOCABULARY and "[gMASK]" in tokens:
        wanted = GLM_IDS
    wrong = [name for name, id in wanted.items() if tokens.get(name) != id]
    if wrong:
        name = wrong[0]
        message = f"{name} has the id {tokens.get(name)}; {wanted[name]} is needed."
        yield found("C11", [key_of(name, TOKENIZER_NAME) for name in wrong], message)
        return
    twice = [name for name, id in tokens.items() if list(tokens.values()).count(id) > 1]
    beyond = [name for name, id in tokens.items() if id >= config.vocab_size]
    if twice or beyond:
        name = (beyond or twice)[0]
        reason = "is beyond the vocabulary" if beyond else "belongs to two tokens"
        message = f"{name} has the id {tokens[name]}, which {reason}."
        yield found("C11", [key_of(name, TOKENIZER_NAME) for name in beyond or twice], message)


def _provenance(evidence: Evidence) -> Iterator[Finding]:
    """K11."""
    source = evidence.source
    named = FP8_BASE.search(evidence.text(MODEL_CARD))
    if source is not None and source.raw.get("quantization_config"):
        message = f"the source {source.files.place} is quantized itself."
        yield found("K11", key_of("quantization_config", source.files.place), message)
    elif named is not None:
        yield found("K11", MODEL_CARD, f"its base_model is {named[1]}, in FP8.")


def _dense_layers(evidence: Evidence) -> Iterator[Finding]:
    """K14."""
    config = evidence.config
    claim = DENSE_CLAIM.search(evidence.text(MODEL_CARD))
    if config is None or claim is None:
        return
    first, last = (int(number) for number in claim.groups() if number is not None)
    dense = [layer for layer, kind in enumerate(config.mlp_types) if kind == "dense"]
    if list(range(first, last + 1)) != dense:
        message = f'it says "{claim[0]}"; dense layers are {list_values(dense)}.'
        yield found("K14", MODEL_CARD, message)
