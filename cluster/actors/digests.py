"""What replicas and drafters must agree on before they work together."""

from __future__ import annotations

from cluster.config import ClusterConfig


def read_digests(config: ClusterConfig) -> dict[str, str]:
    """Hex SHA-256 of the files behind ``target``, ``tokenizer``, ``drafter`` and ``projection``.

    Imports torch. The last two are absent without a drafter.

    Raises:
        CheckpointError: a file cannot be read.
    """
    from cluster.models import checkpoint

    target = config.target.model
    digests = {
        "target": checkpoint.target_digest(target),
        "tokenizer": checkpoint.tokenizer_digest(target),
    }
    if config.speculative is not None:
        drafter = config.speculative.checkpoint
        digests["drafter"] = checkpoint.drafter_digest(drafter)
        digests["projection"] = checkpoint.projection_digest(drafter)
    return digests
