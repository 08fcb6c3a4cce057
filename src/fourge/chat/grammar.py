"""Grammars over the tokens of a checkpoint's vocabulary, by xgrammar.

A matcher says which tokens may come next, takes tokens, and gives them back; masks are int32, one
bit a token. Compiled grammars are kept, so that a schema is compiled once.
"""

import json
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import xgrammar

from fourge.chat.tokens import first_line
from fourge.errors import RequestError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer


class GrammarCompiler:
    """Matchers for one vocabulary."""

    def __init__(
        self, tokenizer: "Tokenizer", *, vocab_size: int, stop_token_ids: Collection[int]
    ) -> None:
        info = xgrammar.TokenizerInfo.from_huggingface(
            tokenizer, vocab_size=vocab_size, stop_token_ids=sorted(stop_token_ids) or None
        )
        self._compiler = xgrammar.GrammarCompiler(info, max_threads=2)

    def matcher(
        self,
        *,
        schema: str | Mapping[str, Any] | None,
        regex: str | None,
        structural_tag: Any,
    ) -> xgrammar.GrammarMatcher:
        """At the beginning of a text of the one that is given. RequestError: it is malformed."""
        try:
            if schema is not None:
                text = schema if isinstance(schema, str) else json.dumps(schema)
                compiled = self._compiler.compile_json_schema(text)
            elif regex is not None:
                compiled = self._compiler.compile_regex(regex)
            else:
                compiled = self._compiler.compile_structural_tag(structural_tag)
        # xgrammar raises several kinds, tvm's among them; any of them means the same.
        except Exception as error:
            raise RequestError(
                f"structured_outputs cannot be used: {first_line(error)}. Correct the schema,"
                " expression or tag."
            ) from error
        return xgrammar.GrammarMatcher(compiled)
