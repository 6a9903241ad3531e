"""`POST /tokenize`: the tokens of a text or a conversation, as vLLM gives them."""

from fastapi.responses import JSONResponse
from pydantic import BaseModel

from deepseek_vl.serve.api.completions import text_ids
from deepseek_vl.serve.api.errors import APIError
from deepseek_vl.serve.api.fields import Strict
from deepseek_vl.serve.api.logprobs import Token, text_of
from deepseek_vl.serve.api.messages import Messages, conversation_of, turns_of
from deepseek_vl.serve.api.service import Service


class TokenizeRequest(Strict):
    """The body of `POST /tokenize`: either a prompt, as completions take it, or messages."""

    example = {"prompt": "What is a boat?"}
    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    return_token_strs: bool | None = None


class Tokens(BaseModel):
    """The body of the answer; an image has as many tokens as it takes positions."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


def tokenize(service: Service, request: TokenizeRequest) -> JSONResponse:
    """Tokenize a text or a conversation. A long one takes long, so call it in a thread.

    Raises:
        APIError: for both a prompt and messages, messages that are no conversation, fields that contradict, or a text
            with more tokens than any prompt may have.
    """
    processor = service.processor
    if request.messages is not None:
        if request.prompt is not None:
            raise APIError("The request has a prompt and messages; give one of them.", "prompt")
        goes_on = bool(request.continue_final_message)
        if goes_on and request.add_generation_prompt:
            message = "continue_final_message and add_generation_prompt cannot both be true."
            raise APIError(message, "add_generation_prompt")
        answers = request.add_generation_prompt is not False
        conversation = conversation_of(turns_of(request.messages), goes_on, answers)
        service.check_images(conversation.urls, "messages")
        prompt = service.prompt_of(conversation, "messages")
        ids, _ = processor.encode(prompt)
    else:
        ids = text_ids(service, request.prompt or "", "prompt")
    if request.add_special_tokens is False:
        ids = ids[len(processor.tokenizer.encode("")) :]
    copies = processor.positions_per_image
    ids = [token for token in ids for _ in range(copies if token == processor.image_id else 1)]
    names = [text_of(Token(service.token_bytes(token), 0.0)) for token in ids] if request.return_token_strs else None
    tokens = Tokens(count=len(ids), max_model_len=service.engine.positions, tokens=ids, token_strs=names)
    return JSONResponse(tokens.model_dump())
