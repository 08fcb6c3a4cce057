"""POST /tokenize and /detokenize: what the model reads, for evaluations and for counting."""

from typing import Any

from fastapi import APIRouter

from fourge.chat.tokens import encode
from fourge.errors import RequestError
from fourge.serve.bodies import body_route
from fourge.serve.preparing import Conversation, prompt_text
from fourge.serve.protocol.openai import (
    DetokenizeRequest,
    TemplateFields,
    TokenizeMessages,
    TokenizePrompt,
)
from fourge.serve.served import Served
from fourge.serve.service import Service


def router(service: Service) -> APIRouter:
    """The routes of this surface."""
    routes = APIRouter(tags=["Tokens"], route_class=body_route(service.limits.max_messages))

    @routes.post("/tokenize")
    async def tokenize(body: TokenizePrompt | TokenizeMessages) -> dict[str, Any]:
        served = service.served
        served.check_name(body.model)
        return await service.in_worker(lambda: _tokenize(served, body))

    @routes.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> dict[str, Any]:
        served = service.served
        served.check_name(body.model)
        return {"prompt": await service.in_worker(lambda: _detokenize(served, body.tokens))}

    return routes


def conversation_tokens(served: Served, conversation: Conversation) -> list[int]:
    """The prompt of a conversation."""
    return encode(served.tokenizer, prompt_text(served, conversation), rendered=True)


def template_conversation(body: TemplateFields) -> Conversation:
    """What the template needs of a request."""
    return Conversation(
        messages=body.rendered_messages(),
        tools=body.rendered_tools(),
        template_options=body.chat_template_kwargs,
        continue_final_message=body.continue_final_message,
        add_generation_prompt=body.add_generation_prompt,
    )


def _tokenize(served: Served, body: TokenizePrompt | TokenizeMessages) -> dict[str, Any]:
    if isinstance(body, TokenizeMessages):
        found = conversation_tokens(served, template_conversation(body))
    else:
        found = encode(served.tokenizer, body.prompt, rendered=not body.add_special_tokens)
    names = served.tokenizer.convert_ids_to_tokens(found) if body.return_token_strs else None
    return {
        "count": len(found),
        "max_model_len": served.max_model_len,
        "tokens": found,
        "token_strs": names,
    }


def _detokenize(served: Served, tokens: list[int]) -> str:
    wrong = [token for token in tokens if not 0 <= token < served.vocab_size]
    if wrong:
        raise RequestError(f"tokens has {wrong[0]}; tokens are 0 to {served.vocab_size - 1}.")
    return str(served.tokenizer.decode(tokens))
