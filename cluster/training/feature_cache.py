"""The target's features and last hidden states of every sequence, kept on disk."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from cluster.errors import CheckpointError, ConfigError
from cluster.models.checkpoint import target_digest
from cluster.training.config import TrainConfig
from cluster.training.dataset import Batch, Dataset
from cluster.training.features import FeatureTarget
from cluster.training.parallel import Worker
from cluster.training.progress import Progress

_DTYPE = torch.bfloat16
_INDEX = "index.json"

_logger = logging.getLogger(__name__)


class FeatureCache:
    """Features of a data set's sequences as shards of safetensors under an index.

    Guarantees: every file is written whole or not at all, so that a killed run goes on with the
    shards it has; the index names target, layers, data and dtype, and a folder with another
    index is refused; shards are read through memory maps, never as a whole.

    A shard ``features-N.safetensors`` holds, for each sequence ``i`` of it, ``i.features``
    ``[length, len(layers) * d]`` and ``i.hidden`` ``[length, d]``, both bf16.
    """

    def __init__(
        self,
        folder: Path,
        config: TrainConfig,
        dataset: Dataset,
        layer_ids: tuple[int, ...],
        hidden_size: int,
    ) -> None:
        """Looks at what is there; computes nothing.

        Raises:
            ConfigError: the cache would exceed ``features.max_gb`` or the disk.
            CheckpointError: the folder holds a cache of something else.
        """
        self._folder = folder
        self._dataset = dataset
        self._shard_sequences = config.features.shard_sequences
        self._num_shards = -(-dataset.num_sequences // self._shard_sequences)
        digest, num_tokens = hashlib.sha256(), 0
        for index in range(dataset.num_sequences):
            token_ids = dataset.sequence(index).token_ids[0]
            digest.update(token_ids.numpy().tobytes())
            num_tokens += len(token_ids)
        self.num_bytes = num_tokens * (len(layer_ids) + 1) * hidden_size * _DTYPE.itemsize
        self._index: dict[str, Any] = {
            "target": target_digest(config.target.model),
            "target_dtype": config.target.dtype,
            "precision": config.optimization.precision,
            "layer_ids": list(layer_ids),
            "dtype": str(_DTYPE).removeprefix("torch."),
            "sequences": digest.hexdigest(),
            "num_sequences": dataset.num_sequences,
            "shard_sequences": self._shard_sequences,
        }
        self._check_index()
        self._check_size(config.features.max_gb)

    def fill(self, target: FeatureTarget, worker: Worker) -> None:
        """Computes the shards that are missing; workers share them, and all wait for all."""
        self._folder.mkdir(parents=True, exist_ok=True)
        if worker.leads:
            _write(self._folder / _INDEX, json.dumps(self._index, indent=2).encode())
        own = range(worker.rank, self._num_shards, worker.count)
        missing = [number for number in own if not self._path(number).exists()]
        with Progress("feature shards", len(missing), quiet=not worker.leads) as progress:
            for number in missing:
                self._fill_shard(number, target, worker.device)
                progress.advance()
        worker.wait()

    def read(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """``(features [B, L, n * d], hidden [B, L, d])`` of a batch, bf16, on its device; padded
        at the end with 0.

        Raises:
            CheckpointError: a shard is broken.
        """
        pairs = [self._read_sequence(index) for index in batch.sequence_ids]
        device = batch.token_ids.device
        features = pad_sequence([pair[0] for pair in pairs], batch_first=True)
        hidden = pad_sequence([pair[1] for pair in pairs], batch_first=True)
        # Other workers' rows may be longer than ours.
        pad = (0, 0, 0, batch.token_ids.shape[1] - features.shape[1])
        return F.pad(features, pad).to(device), F.pad(hidden, pad).to(device)

    def _fill_shard(self, number: int, target: FeatureTarget, device: torch.device) -> None:
        first = number * self._shard_sequences
        tensors = {}
        for index in range(first, min(first + self._shard_sequences, self._index["num_sequences"])):
            token_ids = self._dataset.sequence(index).token_ids.to(device)
            features, hidden = target.run_hidden(token_ids)
            tensors[f"{index}.features"] = features[0].to("cpu", _DTYPE)
            tensors[f"{index}.hidden"] = hidden[0].to("cpu", _DTYPE)
        path = self._path(number)
        partial = path.with_suffix(".partial")
        save_file(tensors, partial)
        os.replace(partial, path)

    def _read_sequence(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        path = self._path(index // self._shard_sequences)
        try:
            with safe_open(path, framework="pt") as file:
                return file.get_tensor(f"{index}.features"), file.get_tensor(f"{index}.hidden")
        except (OSError, SafetensorError) as error:
            raise CheckpointError(str(path), None, f"broken feature shard: {error}") from error

    def _path(self, number: int) -> Path:
        return self._folder / f"features-{number:05d}.safetensors"

    def _check_index(self) -> None:
        path = self._folder / _INDEX
        if not path.exists():
            return
        found = json.loads(path.read_text(encoding="utf-8"))
        for key, value in self._index.items():
            if found.get(key) != value:
                raise CheckpointError(
                    str(path), key, f"is {found.get(key)!r}, not {value!r}: made by another run"
                )

    def _check_size(self, max_gb: float) -> None:
        gigabytes = self.num_bytes / 1e9
        _logger.info("the feature cache takes %.2f GB in %s", gigabytes, self._folder)
        if gigabytes > max_gb:
            raise ConfigError(
                "features.max_gb", f"{max_gb:g} GB do not hold the {gigabytes:.1f} GB of this data"
            )
        parent = next(path for path in (self._folder, *self._folder.parents) if path.exists())
        present = sum(path.stat().st_size for path in self._folder.glob("*.safetensors"))
        if self.num_bytes - present > shutil.disk_usage(parent).free:
            raise ConfigError("features.folder", f"its disk has no {gigabytes:.1f} GB free")


def _write(path: Path, content: bytes) -> None:
    partial = path.with_suffix(".partial")
    partial.write_bytes(content)
    os.replace(partial, path)
