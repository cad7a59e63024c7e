"""Reads and writes EAGLE-3 checkpoints of DeepSpec's and of SafeAILab's format.

What SafeAILab's format leaves to the target, the embedding and often the layers that are read, is
taken from the target's folder. Configuration, projection and digests are read by
``cluster.models.checkpoint``, as those of every drafter.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from cluster.errors import CheckpointError
from cluster.models.checkpoint_files import cast_weights, read_tensors, write_checkpoint
from cluster.models.drafter_config import load_drafter_config
from cluster.models.eagle3 import Eagle3Config, Eagle3Drafter
from cluster.models.hub import local_folder
from cluster.models.tensor_headers import weight_files

_EMBEDDING = "embed_tokens.weight"
_MAP = ("d2t", "t2d")
_LAYER, _LAYER_IN_LLAMA = "layers.0.", "midlayer."


def load_eagle3(
    path: str | Path,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    target: str | Path | None = None,
    num_target_layers: int | None = None,
) -> Eagle3Drafter:
    """Loads an EAGLE-3 drafter for use: eval mode, no gradients, weights of ``dtype``.

    Args:
        path: the drafter's folder or hub id.
        dtype: of the weights.
        device: where they go.
        target: the target's folder or hub id, for checkpoints without an embedding.
        num_target_layers: as ``load_drafter_config`` takes it.

    Raises:
        CheckpointError: a file is missing or broken, or a tensor is missing, unexpected, of the
            wrong shape, or not what a vocabulary map may be.
    """
    config = load_drafter_config(path, num_target_layers)
    if not isinstance(config, Eagle3Config):
        raise CheckpointError(str(path), "architectures", "is no EAGLE-3 drafter")
    folder = local_folder(path)
    drafter = Eagle3Drafter(config)
    shapes = {name: value.shape for name, value in drafter.state_dict().items()}
    optional: set[str] = set()
    if config.has_vocabulary_map:
        optional = {_EMBEDDING, "t2d"}
        if config.draft_vocab_size == config.vocab_size:
            optional.add("d2t")
    tensors = read_tensors(
        folder,
        shapes,
        "an EAGLE-3 drafter",
        optional,
        rename=lambda key: key.replace(_LAYER_IN_LLAMA, _LAYER, 1),
    )
    if _EMBEDDING not in tensors:
        tensors[_EMBEDDING] = _target_embedding(folder, shapes[_EMBEDDING], target)
    vocabulary = {key: tensors.pop(key) for key in _MAP if key in tensors}
    drafter.load_state_dict(tensors, strict=False)
    if "d2t" in vocabulary:
        _set_vocabulary(drafter, vocabulary, str(folder))
    drafter.requires_grad_(False)
    cast_weights(drafter, dtype)
    return drafter.to(device).eval()


def save_eagle3(
    drafter: Eagle3Drafter,
    path: str | Path,
    dtype: torch.dtype = torch.bfloat16,
    with_embedding: bool = True,
) -> None:
    """Writes ``drafter`` to folder ``path`` in its own format; each file is replaced atomically.

    ``with_embedding`` false leaves the embedding to the target, as SafeAILab's training does.

    Raises:
        ValueError: the format must carry its embedding.
    """
    llama = drafter.config.has_vocabulary_map
    if not (with_embedding or llama):
        raise ValueError(f"{drafter.config.architecture} checkpoints carry their embedding")
    tensors = {
        name.replace(_LAYER, _LAYER_IN_LLAMA, 1) if llama else name: value
        for name, value in drafter.state_dict().items()
        if with_embedding or name != _EMBEDDING
    }
    write_checkpoint(path, drafter.config.to_dict(), tensors, dtype)


def _set_vocabulary(drafter: Eagle3Drafter, vocabulary: dict[str, torch.Tensor], file: str) -> None:
    """Checks and sets the map; ``d2t`` holds each draft token's target id less its own."""
    d2t, known = vocabulary["d2t"], vocabulary.get("t2d")
    if d2t.is_floating_point() or d2t.dtype == torch.bool:
        raise CheckpointError(file, "d2t", f"must hold integers, not {d2t.dtype}")
    try:
        drafter.set_draft_token_ids(d2t.long() + torch.arange(len(d2t)))
    except ValueError as error:
        raise CheckpointError(file, "d2t", f"does not map into the vocabulary: {error}") from error
    if known is not None and not torch.equal(known.bool(), drafter.t2d):
        raise CheckpointError(file, "t2d", "does not mark the tokens that d2t maps to")


def _target_embedding(folder: Path, shape: torch.Size, target: str | Path | None) -> torch.Tensor:
    """The target's token embedding, whatever model it is part of."""
    if target is None:
        raise CheckpointError(
            str(folder), _EMBEDDING, "is missing, and no target to take it from was given"
        )
    place = local_folder(target)
    for name in weight_files(place):
        try:
            with safe_open(place / name, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 (not a mapping)
                    if key == _EMBEDDING or key.endswith("." + _EMBEDDING):
                        found = file.get_tensor(key)
                        if found.shape != shape:
                            raise CheckpointError(
                                str(place / name),
                                key,
                                f"has shape {list(found.shape)}; the drafter in {folder} needs "
                                f"{list(shape)}",
                            )
                        return found
        except (OSError, SafetensorError) as error:
            raise CheckpointError(str(place / name), None, f"cannot be read: {error}") from error
    raise CheckpointError(str(place), _EMBEDDING, "is missing; the drafter has none of its own")
