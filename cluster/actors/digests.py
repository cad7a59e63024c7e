"""What replicas and drafters must agree on before they work together."""

from __future__ import annotations

import hashlib
import json

from cluster.config import ClusterConfig


def read_digests(config: ClusterConfig) -> dict[str, str]:
    """Hex SHA-256 of what is behind ``target``, ``tokenizer``, ``drafter`` and ``projection``.

    Imports torch. The last two are absent without a drafter, the last one with a method that reads
    no features; for a method without a checkpoint the method's settings stand for the drafter.

    Raises:
        CheckpointError: a file cannot be read.
    """
    from cluster.engine.target_config import load_text_config
    from cluster.models import checkpoint

    target = config.target.model
    digests = {
        "target": checkpoint.target_digest(target),
        "tokenizer": checkpoint.tokenizer_digest(target),
    }
    speculative = config.speculative
    if speculative is None:
        return digests
    if speculative.model is None:
        settings = json.dumps([speculative.method, *speculative.prompt_lookup])
        digests["drafter"] = hashlib.sha256(settings.encode()).hexdigest()
    else:
        digests["drafter"] = checkpoint.drafter_digest(speculative.model)
    if speculative.uses_features:
        text_config = load_text_config(target, trust_remote_code=config.target.trust_remote_code)
        digests["projection"] = checkpoint.projection_digest(
            speculative.checkpoint, text_config.num_hidden_layers
        )
    return digests
