"""What a target's checkpoint says of it, for those too who do not need its network.

Importing a network's class takes transformers seconds; nothing here does.
"""

from __future__ import annotations

from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from cluster.errors import CheckpointError


def load_text_config(model: str, *, trust_remote_code: bool = False) -> Any:
    """The checkpoint's (text) configuration.

    Raises:
        CheckpointError: the folder has none, or it cannot be read.
    """
    try:
        config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
    except StrictDataclassError as error:  # keys that contradict each other
        message = " ".join(str(error).split())
        raise CheckpointError(model, "config.json", message) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(model, "config.json", str(error).split("\n")[0]) from error
    return config.get_text_config()


def load_tokenizer(model: str, *, trust_remote_code: bool = False) -> Any:
    """The checkpoint's tokenizer.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    try:
        return AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise CheckpointError(model, "tokenizer.json", str(error).split("\n")[0]) from error


def eos_token_ids(model: str, *, trust_remote_code: bool = False) -> tuple[int, ...]:
    """Tokens that end an output: of the generation configuration, else of the model's."""
    try:
        value = GenerationConfig.from_pretrained(model).eos_token_id
    except OSError:
        value = None
    if value is None:
        value = load_text_config(model, trust_remote_code=trust_remote_code).eos_token_id
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(value)
