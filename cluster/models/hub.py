"""Where a checkpoint's files are: a folder as it is, or a Hugging Face id, downloaded once."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from cluster.errors import CheckpointError

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_FILES = ["*.json", "*.safetensors", "*.txt", "*.model"]


def local_folder(model: str | Path) -> Path:
    """The folder that holds a checkpoint; files of a hub id come from its cache or the network.

    Raises:
        CheckpointError: there is no such folder, and no such model on the hub.
    """
    folder = Path(model)
    if folder.exists() or not _HUB_ID.fullmatch(str(model)):
        return folder
    try:
        return Path(snapshot_download(str(model), allow_patterns=_FILES))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            str(model), None, "is no folder here, and cannot be had from the Hugging Face hub"
        ) from error
