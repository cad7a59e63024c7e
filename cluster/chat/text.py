"""What is text: JSON can write more than UTF-8 can."""

from __future__ import annotations

import json
from typing import Any

from cluster.errors import InvalidRequestError


def check_text(value: Any, field: str) -> None:
    """Checks every string in a JSON value, names included.

    Raises:
        InvalidRequestError: naming ``field``, one holds half of a surrogate pair alone, as JSON's
            ``"\\ud800"`` does: no tokenizer has a token for it, and UTF-8 cannot carry it.
            Or the value is nested too deeply.
    """
    try:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        text.encode()
    except UnicodeEncodeError:
        raise InvalidRequestError(
            field, "holds a lone surrogate, which is not valid Unicode text"
        ) from None
    except RecursionError:
        raise InvalidRequestError(field, "is nested too deeply") from None
