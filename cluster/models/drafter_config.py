"""Reads the configuration of a drafter of any format, without torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluster.errors import CheckpointError
from cluster.models.deepseek_v4_config import DEEPSEEK_V4, DeepSeekV4DSparkConfig
from cluster.models.deepseek_v4_names import is_ours, stage_of
from cluster.models.dspark_config import DSparkConfig
from cluster.models.eagle3_config import Eagle3Config, is_eagle3
from cluster.models.hub import local_folder
from cluster.models.json_files import read_json
from cluster.models.tensor_headers import check_tensors, read_headers, tensor_names

_CONFIG = "config.json"


def has_draft_module(data: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` is that of a target which carries a DSpark draft module."""
    return "dspark_block_size" in data


def load_drafter_config(
    path: str | Path, num_target_layers: int | None = None
) -> DSparkConfig | Eagle3Config:
    """Reads and checks ``config.json`` of the drafter in folder ``path``.

    ``num_target_layers`` is for EAGLE-3 checkpoints that leave their layers to the target.

    Raises:
        CheckpointError: the file is missing, is not JSON, or describes no drafter.
    """
    folder = local_folder(path)
    file = str(folder / _CONFIG)
    data = read_json(folder / _CONFIG)
    if is_eagle3(data):
        return Eagle3Config.from_dict(data, file, num_target_layers)
    if has_draft_module(data):
        return DeepSeekV4DSparkConfig.from_target(data, _count_stages(folder), file)
    if data.get("architectures") == [DEEPSEEK_V4]:
        raise CheckpointError(
            file, "dspark_block_size", "is missing: this DeepSeek-V4 has no DSpark draft module"
        )
    return DSparkConfig.from_dict(data, file)


def _count_stages(folder: Path) -> int:
    """How many layers the draft module in ``folder`` has, by the names of its tensors."""
    stages = {stage_of(name) for name in tensor_names(folder)} - {None}
    if not stages or stages != set(range(len(stages))):
        missing = next(stage for stage in range(len(stages) + 1) if stage not in stages)
        raise CheckpointError(str(folder), f"mtp.{missing}", "has no tensors")
    return len(stages)


def check_drafter_files(path: str | Path, config: DSparkConfig | Eagle3Config) -> None:
    """Checks what can be known of a drafter's weights without torch: that every file is there and
    whole, and that the projection fits and is not quantised. Loading checks the other tensors.

    Raises:
        CheckpointError: names the file and the tensor.
    """
    folder = local_folder(path)
    if isinstance(config, DeepSeekV4DSparkConfig):
        read_headers(folder, is_ours)
    else:
        read_headers(folder)
    width = config.hidden_size
    check_tensors(folder, {config.projection_key: (width, len(config.target_layer_ids) * width)})
