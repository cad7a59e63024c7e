"""Objects of a request in OpenAI's form, and what becomes of fields that are not served.

No field is ignored: what is not served is refused by name, unless its value asks for nothing.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator

# Fields that change no output, whatever they hold.
_WITHOUT_EFFECT = frozenset(
    {
        "metadata",
        "prediction",  # a guess at the answer, for speed; drafters make theirs
        "prompt_cache_breakpoint",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "safety_identifier",
        "user",
    }
)
# Fields that are not served, with the values that ask for nothing.
_NOTHING_ASKED: dict[str, tuple[Any, ...]] = {
    "annotations": ([],),
    "audio": (),
    "length_penalty": (1.0,),
    "modalities": (["text"],),
    "moderation": (),
    "service_tier": ("auto", "default"),
    "spaces_between_special_tokens": (True,),
    "store": (False,),
    "suffix": ("",),
    "use_beam_search": (False,),
    "verbosity": ("medium",),
    "web_search_options": (),
}
# Why, where "is not served" does not say enough.
REFUSALS = dict.fromkeys(_NOTHING_ASKED, "is not served") | {
    "audio": "is not served: text only",
    "modalities": "is not served: text only",
    "suffix": "is not served: text is only continued",
}


class Fields(BaseModel):
    """An object of a request: types are exact, and unknown names are refused. Null is unset."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _drop_what_asks_for_nothing(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {
            name: value
            for name, value in values.items()
            if value is not None
            and (name in cls.model_fields or not _asks_for_nothing(name, value))
        }


def _asks_for_nothing(name: str, value: Any) -> bool:
    return name in _WITHOUT_EFFECT or value in _NOTHING_ASKED.get(name, ())
