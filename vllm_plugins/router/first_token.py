"""Which requests can have their first token from the prefill instance, and which no hand-over.

With ``--first-token prefill``, the prefill instance's token t1 goes to the client at once, and the
decode instance is asked to continue the token ids prompt + [t1]. For the decode instance t1 is then
part of the prompt. Whatever treats prompt and answer differently would see the difference, so such
requests are served as with ``--first-token decode``. Only fields that are known to be safe are let
through: a field that a later vLLM adds is one more reason to fall back, not a wrong answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm_plugins.router.bodies import CHAT, Call

REASONS: Mapping[str, str] = {
    "not_streaming": "the answer is sent when it is complete, so an early token gains nothing",
    "n": "more than one answer: n, best_of, beam search, or several prompts",
    "logprobs": "logprobs or prompt_logprobs, whose positions would shift",
    "penalties": "presence, frequency or repetition penalties count t1 as prompt",
    "structured": "structured outputs or response_format: the grammar must see t1",
    "tools": "tools: the parser of tool calls must see t1",
    "stop": "stop strings or bad_words, which may begin in t1",
    "min_tokens": "min_tokens above 1 would not count t1",
    "echo": "echo would repeat t1 as part of the prompt",
    "no_limit": "chat without max_tokens: the server's own limit is not known",
    "seed": "a seed with temperature above 0: the second instance's random state begins anew",
    "media": "images and other media: a prompt of token ids cannot carry them",
    "other_field": "a field whose meaning for a continued prompt is not known",
    "empty_text": "t1 has no text of its own, or only part of a character",
    "no_ids": "the prefill instance returned no token ids, or a message with a reasoning parser",
}
"""Why a request's first token comes from the decode instance, by the metric's label."""

HOLDS_ONE: Mapping[str, str] = {
    "n": "the held KV is pulled once, but several sequences need it",
    "prompt_logprobs": "logprobs of the prompt need its forward pass",
    "not_held": "the prefill instance holds nothing: the answer ended at once, or its connector "
    "is missing or has no room",
}
"""Why the decode instance computes a prompt itself, without a hand-over."""

_NEUTRAL: tuple[Any, ...] = (None, False, 0, 0.0, [], {}, "")
_ALWAYS_SAFE = frozenset(
    {
        "allowed_token_ids", "cache_salt", "ignore_eos", "include_stop_str_in_output", "logit_bias",
        "max_completion_tokens", "max_tokens", "min_p", "min_tokens", "model", "n", "priority",
        "return_token_ids", "seed", "session_id", "skip_special_tokens",
        "spaces_between_special_tokens", "stop_token_ids", "stream", "stream_interval",
        "stream_options", "temperature", "top_k", "top_p", "user",
    }
)  # fmt: skip
# These only say how the prompt is made, which the prefill instance has done.
_PROMPT_ONLY = frozenset(
    {
        "add_generation_prompt", "add_special_tokens", "chat_template", "chat_template_kwargs",
        "continue_final_message", "documents", "messages", "prompt", "reasoning_effort",
        "truncate_prompt_tokens", "truncation_side",
    }
)  # fmt: skip
# Given at these values they change nothing.
_HARMLESS: Mapping[str, Any] = {
    "best_of": 1,
    "detokenize": True,
    "include_reasoning": True,
    "length_penalty": 1.0,
    "parallel_tool_calls": True,
    "repetition_penalty": 1.0,
    "response_format": {"type": "text"},
    "tool_choice": "none",
}
_REASON_OF_FIELD: Mapping[str, str] = {
    "best_of": "n",
    "use_beam_search": "n",
    "logprobs": "logprobs",
    "top_logprobs": "logprobs",
    "prompt_logprobs": "logprobs",
    "presence_penalty": "penalties",
    "frequency_penalty": "penalties",
    "repetition_penalty": "penalties",
    "structured_outputs": "structured",
    "response_format": "structured",
    "tools": "tools",
    "tool_choice": "tools",
    "stop": "stop",
    "bad_words": "stop",
    "echo": "echo",
    "mm_processor_kwargs": "media",
    "media_io_kwargs": "media",
}


def why_not_early(call: Call) -> str | None:
    """Return why a request's first token must come from the decode instance, a key of ``REASONS``.

    None where the prefill instance's token may be sent, as far as the request alone tells.
    """
    body = call.body
    if not call.streams:
        return "not_streaming"
    if (body.get("n") or 1) != 1 or has_many_prompts(body):
        return "n"
    if (body.get("min_tokens") or 0) > 1:
        return "min_tokens"
    if call.max_tokens is None:
        return "no_limit"
    if body.get("seed") is not None and body.get("temperature") != 0:
        return "seed"
    if has_media(body):
        return "media"
    return _by_field(body)


def _by_field(body: Mapping[str, Any]) -> str | None:
    for name, value in body.items():
        if value in _NEUTRAL and not _asks_zero(name, value):
            continue
        if name in _ALWAYS_SAFE or name in _PROMPT_ONLY or _HARMLESS.get(name) == value:
            continue
        return _REASON_OF_FIELD.get(name, "structured" if "guided" in name else "other_field")
    return None


def _asks_zero(name: str, value: object) -> bool:
    """Whether 0 is an order: the logprobs of the chosen tokens alone."""
    return name in ("logprobs", "prompt_logprobs") and value is not False and value == 0


def why_alone(body: Mapping[str, Any]) -> str | None:
    """Return why the decode instance must compute the prompt itself, a key of ``HOLDS_ONE``."""
    if (body.get("n") or 1) != 1 or (body.get("best_of") or 1) != 1 or has_many_prompts(body):
        return "n"
    if body.get("use_beam_search"):
        return "n"
    if body.get("prompt_logprobs") is not None:
        return "prompt_logprobs"
    return "prompt_logprobs" if body.get("echo") and body.get("logprobs") is not None else None


def has_many_prompts(body: Mapping[str, Any]) -> bool:
    """Whether a completion has several prompts in one request."""
    prompt = body.get("prompt")
    if not isinstance(prompt, list):
        return False
    return len(prompt) > 1 and not isinstance(prompt[0], int)


def has_media(body: Mapping[str, Any]) -> bool:
    """Whether a conversation has parts that are not text."""
    messages = body.get("messages")
    for message in messages if isinstance(messages, list) else ():
        content = message.get("content") if isinstance(message, dict) else None
        for part in content if isinstance(content, list) else ():
            if not isinstance(part, dict) or part.get("type") not in ("text", "input_text"):
                return True
    return "prompt_embeds" in body


def continued_fields(call: Call) -> dict[str, Any]:
    """Return the fields of a request that also a continued completion has."""
    dropped = _PROMPT_ONLY | _HARMLESS.keys() | {"max_completion_tokens", "min_tokens", "user"}
    fields = {name: value for name, value in call.body.items() if name not in dropped}
    if call.path == CHAT:
        for name in ("tools", "logprobs", "top_logprobs", "echo"):
            fields.pop(name, None)
    return fields
