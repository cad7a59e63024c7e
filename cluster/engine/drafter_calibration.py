"""Which calibration a configured drafter's confidences get."""

from __future__ import annotations

from collections.abc import Mapping

from cluster.config import ClusterConfig, SpeculativeConfig
from cluster.models.calibration_file import load_calibration
from cluster.models.drafter_config import load_drafter_config
from cluster.models.dspark_config import DSparkConfig
from cluster.speculation.calibration import Calibration


def block_size_of(speculative: SpeculativeConfig) -> int | None:
    """Positions that the checkpoint of a block drafter has; ``None`` with other methods.

    Raises:
        CheckpointError: its configuration cannot be read.
    """
    if speculative.method not in ("dspark", "dflash"):
        return None
    config = load_drafter_config(speculative.checkpoint)
    return config.block_size if isinstance(config, DSparkConfig) else None


def load_drafter_calibration(
    config: ClusterConfig, digests: Mapping[str, str] | None = None
) -> Calibration:
    """The calibration beside the configured drafter's checkpoint; empty where there is none.

    Args:
        digests: of ``drafter`` and ``target``, where they are known already.

    Raises:
        CheckpointError: as ``load_calibration``.
    """
    speculative = config.speculative
    if speculative is None or speculative.model is None:
        return Calibration()
    return load_calibration(
        speculative.model,
        config.target.model,
        num_positions=block_size_of(speculative),
        digests=digests,
    )
