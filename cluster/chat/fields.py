"""Objects of a request in OpenAI's form, and what becomes of fields that are not served.

No field is ignored: what is not served is refused by name, unless its value asks for nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, model_validator

# Fields of a completion that change no output, whatever they hold.
WITHOUT_EFFECT = frozenset(
    {
        "metadata",
        "prediction",  # a guess at the answer, for speed; drafters make theirs
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "safety_identifier",
        "spaces_between_special_tokens",  # fast tokenizers put none between them
        "user",
    }
)
# Fields of a completion that are not served, with the values that ask for nothing.
NOT_SERVED: Mapping[str, tuple[Any, ...]] = {
    "audio": (),
    "length_penalty": (1.0,),
    "modalities": (["text"],),
    "moderation": (),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "use_beam_search": (False,),
    "verbosity": ("medium",),
    "web_search_options": (),
}
# Why, where "is not served" does not say enough.
REFUSALS = dict.fromkeys(NOT_SERVED, "is not served") | {
    "audio": "is not served: text only",
    "modalities": "is not served: text only",
    "suffix": "is not served: text is only continued",
}


class Fields(BaseModel):
    """An object of a request: types are exact, and unknown names are refused. Null is unset.

    Attributes:
        without_effect: names that are taken beside the fields, whatever they hold.
        not_served: names that are taken with the values given here, which ask for nothing.
    """

    model_config = ConfigDict(extra="forbid", strict=True)
    without_effect: ClassVar[frozenset[str]] = frozenset()
    not_served: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _drop_what_asks_for_nothing(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {
            name: value
            for name, value in values.items()
            if value is not None
            and (name in cls.model_fields or not cls._asks_for_nothing(name, value))
        }

    @classmethod
    def _asks_for_nothing(cls, name: str, value: Any) -> bool:
        return name in cls.without_effect or value in cls.not_served.get(name, ())
