"""Valid bodies of the HTTP paths: between them they hold every field that is documented."""

from __future__ import annotations

from typing import Any

_SCHEMA: dict[str, Any] = {"type": "object", "properties": {"a": {"type": "integer"}}}
_ADD: dict[str, Any] = {
    "name": "add",
    "description": "two numbers",
    "parameters": _SCHEMA,
    "strict": True,
}
_FUNCTION_TOOL: dict[str, Any] = {"type": "function", "function": _ADD}
_CUSTOM_TOOLS: list[dict[str, Any]] = [
    {"type": "custom", "custom": {"name": "plain", "format": {"type": "text"}}},
    {
        "type": "custom",
        "custom": {
            "name": "words",
            "description": "some words",
            "format": {
                "type": "grammar",
                "grammar": {"definition": "[a-z]+", "syntax": "regex"},
            },
        },
    },
    {
        "type": "custom",
        "custom": {
            "name": "lines",
            "format": {
                "type": "grammar",
                "grammar": {"definition": 'start: "a"+', "syntax": "lark"},
            },
        },
    },
]
_USER = [{"role": "user", "content": "add"}]
_CONVERSATION: list[dict[str, Any]] = [
    {"role": "system", "content": [{"type": "text", "text": "be brief"}]},
    {"role": "developer", "content": "and kind"},
    {"role": "user", "content": "add", "name": "ann"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {
                "id": "c1",
                "type": "function",
                "function": {"name": "add", "arguments": '{"a": 1}'},
            },
            {"id": "c2", "type": "custom", "custom": {"name": "words", "input": "x y"}},
        ],
    },
    {"role": "tool", "content": "2", "tool_call_id": "c1"},
    {"role": "assistant", "function_call": {"name": "add", "arguments": "{}"}},
    {"role": "function", "name": "add", "content": None},
    {
        "role": "assistant",
        "content": [{"type": "refusal", "refusal": "no"}],
        "refusal": "no",
        "reasoning_content": "why not",
        "annotations": [],
    },
    {"role": "user", "content": [{"type": "text", "text": "go", "prompt_cache_breakpoint": {}}]},
]
# What changes no output, and what is not served with the values that ask for nothing.
_IDLE = {
    "metadata": {"k": "v"},
    "prediction": {"type": "content", "content": "x"},
    "prompt_cache_key": "k",
    "prompt_cache_options": {},
    "prompt_cache_retention": "24h",
    "safety_identifier": "s",
    "spaces_between_special_tokens": True,
    "user": "u",
    "audio": None,
    "length_penalty": 1.0,
    "modalities": ["text"],
    "moderation": None,
    "service_tier": "auto",
    "store": False,
    "use_beam_search": False,
    "verbosity": "medium",
    "web_search_options": None,
}
_SAMPLING = {
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 20,
    "min_p": 0.1,
    "seed": 7,
    "stop": ["zz"],
    "stop_token_ids": [5],
    "min_tokens": 1,
    "presence_penalty": 0.5,
    "frequency_penalty": -0.5,
    "repetition_penalty": 1.2,
    "logit_bias": {"5": 1.5, "6": -100},
    "ignore_eos": True,
    "skip_special_tokens": False,
    "include_stop_str_in_output": True,
    "bad_words": ["x"],
}
_EXTENSIONS = {
    "speculation": "auto",
    "num_speculative_tokens": 3,
    "priority": "batch",
    "timeout_seconds": 60.0,
    "truncate_prompt_tokens": 4,
    "return_token_ids": True,
    "return_tokens_as_token_ids": True,
    "return_token_sources": True,
    "return_speculation_stats": True,
    "prompt_logprobs": 1,
}
_STREAM = {
    "stream": True,
    "stream_options": {
        "include_usage": True,
        "continuous_usage_stats": True,
        "include_obfuscation": True,
    },
}
_JSON_FORMAT = {
    "type": "json_schema",
    "json_schema": {"name": "s", "description": "d", "schema": {"type": "object"}, "strict": True},
}
_GRAMMARS: tuple[dict[str, Any], ...] = (
    {"json": _SCHEMA},
    {"json": '{"type": "integer"}'},
    {"json_object": True},
    {"regex": "[a-z]+"},
    {"choice": ["yes", "no"]},
    {"grammar": 'start: "a"'},
)

_COMPLETIONS: list[dict[str, Any]] = [
    {"model": "fuzz", "prompt": "def f(x):", "max_tokens": 4, **_SAMPLING, "n": 2},
    {"prompt": [[1, 2], [3]], "echo": True, "logprobs": 2, **_STREAM},
    {"prompt": "ab", **_EXTENSIONS, "max_tokens": 1, "best_of": 2},
    {"prompt": ["a", "b"], "best_of": 3, "n": 2, "logprobs": 0, "add_special_tokens": False},
    {"prompt": [7, 8], "allowed_token_ids": [7, 8], "priority": -1, "speculation": "off"},
    {"prompt": "a", **_IDLE, "suffix": "", "stop": "b", "top_k": -1, "truncate_prompt_tokens": -1},
    {"prompt": "a", "response_format": _JSON_FORMAT},
    {"prompt": "a", "response_format": {"type": "json_object"}},
    *({"prompt": "a", "structured_outputs": grammar, **_STREAM} for grammar in _GRAMMARS),
    {"prompt": "a b", "max_tokens": 0, "echo": True, "logprobs": 1, "prompt_logprobs": 2},
]
_CHATS: list[dict[str, Any]] = [
    {"model": "fuzz", "messages": _USER, "max_tokens": 4, **_SAMPLING, "n": 2},
    {"messages": _CONVERSATION, "logprobs": True, "top_logprobs": 2, **_STREAM},
    {"messages": _USER, **_EXTENSIONS, "max_completion_tokens": 2, "priority": 1},
    {"messages": _USER, **_IDLE, "response_format": {"type": "text"}},
    {
        "messages": _USER,
        "tools": [_FUNCTION_TOOL, *_CUSTOM_TOOLS],
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "stream": True,
    },
    {"messages": _USER, "tools": [_FUNCTION_TOOL, *_CUSTOM_TOOLS[:2]], "tool_choice": "required"},
    {"messages": _USER, "tools": [_FUNCTION_TOOL], "tool_choice": "none"},
    {
        "messages": _USER,
        "tools": [_FUNCTION_TOOL],
        "tool_choice": {"type": "function", "function": {"name": "add"}},
        "parallel_tool_calls": False,
    },
    {
        "messages": _USER,
        "tools": _CUSTOM_TOOLS,
        "tool_choice": {"type": "custom", "custom": {"name": "lines"}},
    },
    {
        "messages": _USER,
        "tools": [_FUNCTION_TOOL, *_CUSTOM_TOOLS],
        "tool_choice": {
            "type": "allowed_tools",
            "allowed_tools": {
                "mode": "auto",
                "tools": [
                    {"type": "function", "function": {"name": "add"}},
                    {"type": "custom", "custom": {"name": "words"}},
                ],
            },
        },
        "structured_outputs": {"regex": "[a-z]+"},
    },
    {"messages": _USER, "functions": [_ADD], "function_call": {"name": "add"}},
    {"messages": _USER, "functions": [_ADD], "function_call": "auto", "stream": True},
    {"messages": _USER, "response_format": _JSON_FORMAT},
    {
        "messages": [*_USER, {"role": "assistant", "content": "the sum"}],
        "add_generation_prompt": False,
        "continue_final_message": True,
    },
    {
        "messages": _USER,
        "chat_template": "{{ messages[0].content }}{{ reasoning_effort }}{{ mood }}",
        "chat_template_kwargs": {"mood": "x"},
        "reasoning_effort": "low",
    },
    {"messages": _USER, "allowed_token_ids": [7]},
    *({"messages": _USER, "structured_outputs": grammar} for grammar in _GRAMMARS),
]
_TOKENIZE: list[dict[str, Any]] = [
    {"model": "fuzz", "prompt": "a b", "add_special_tokens": False, "return_token_strs": True},
    {
        "messages": _CONVERSATION,
        "tools": [_FUNCTION_TOOL, _CUSTOM_TOOLS[1]],
        "add_generation_prompt": False,
        "continue_final_message": False,
    },
    {
        "messages": _USER,
        "chat_template": "{{ messages[0].content }}{{ reasoning_effort }}{{ mood }}",
        "chat_template_kwargs": {"mood": [1]},
        "reasoning_effort": "high",
    },
]
_DETOKENIZE: list[dict[str, Any]] = [{"model": "fuzz", "tokens": [40, 41, 42]}, {"tokens": []}]

# By path.
HTTP_BODIES: dict[str, list[dict[str, Any]]] = {
    "/v1/completions": _COMPLETIONS,
    "/v1/chat/completions": _CHATS,
    "/tokenize": _TOKENIZE,
    "/detokenize": _DETOKENIZE,
}
