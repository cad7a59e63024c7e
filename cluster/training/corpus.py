"""The corpus of the small model pair: the source of the running Python's standard library.

Tests and generated tables are left out. The modules listed in ``heldout_modules.txt`` are never
trained on; every held-out figure of the project comes from them.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

HELDOUT_LIST = Path(__file__).with_name("heldout_modules.txt")

_EXCLUDED_FOLDERS = {
    "site-packages",
    "test",
    "tests",
    "idle_test",
    "encodings",
    "pydoc_data",
    "__pycache__",
    "__phello__",
}
_EXCLUDED_PREFIXES = ("config-", "_sysconfigdata")


@dataclass(frozen=True)
class Document:
    """One source file: ``path`` relative to the standard library's folder, and its text."""

    path: str
    text: str


def heldout_paths() -> frozenset[str]:
    """The committed list of held-out files, as paths relative to the standard library."""
    lines = (line.strip() for line in HELDOUT_LIST.read_text(encoding="utf-8").splitlines())
    return frozenset(line for line in lines if line and not line.startswith("#"))


def load_documents() -> tuple[list[Document], list[Document]]:
    """Reads the corpus of the running interpreter.

    Returns:
        ``(training, heldout)``, each sorted by path. Files that are not UTF-8 are left out.
    """
    root = Path(sysconfig.get_path("stdlib"))
    heldout_names = heldout_paths()
    training: list[Document] = []
    heldout: list[Document] = []
    for path in sorted(root.rglob("*.py")):
        relative = PurePosixPath(path.relative_to(root).as_posix())
        if _is_excluded(relative):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip():
            group = heldout if str(relative) in heldout_names else training
            group.append(Document(str(relative), text))
    return training, heldout


def _is_excluded(relative: PurePosixPath) -> bool:
    if any(folder in _EXCLUDED_FOLDERS for folder in relative.parts[:-1]):
        return True
    return any(part.startswith(_EXCLUDED_PREFIXES) for part in relative.parts)


class TokenStream:
    """Documents as one endless, seeded stream of equal windows.

    Every epoch shuffles the documents, joins them, each behind one end-of-text token, cuts the
    result into windows and shuffles those, so that a batch mixes files. Window ``i`` depends on
    nothing but the documents, the seed and ``i``, so that a resumed training run continues with
    the data that it would have seen.
    """

    def __init__(
        self,
        documents: list[Document],
        tokenizer: PreTrainedTokenizerBase,
        window: int,
        seed: int = 0,
        shuffle: bool = True,
    ) -> None:
        """Tokenizes ``documents``; ``window`` is in tokens.

        Raises:
            ValueError: the documents do not fill one window.
        """
        texts = [document.text for document in documents]
        encoded = tokenizer(texts, verbose=False)["input_ids"]  # files exceed the model's length
        separator = tokenizer.eos_token_id
        self._pieces = [np.asarray([separator, *ids], dtype=np.int64) for ids in encoded]
        self._window = window
        self._seed = seed
        self._shuffle = shuffle
        self._epoch = -1
        self._joined = self._order = np.empty(0, dtype=np.int64)
        self.num_tokens = sum(len(piece) for piece in self._pieces)
        self.windows_per_epoch = self.num_tokens // window
        if self.windows_per_epoch == 0:
            raise ValueError(f"{self.num_tokens} tokens do not fill one window of {window}")

    def window(self, index: int) -> torch.Tensor:
        """Window ``index`` (any non-negative number) as an int64 tensor ``[window]``."""
        epoch, offset = divmod(index, self.windows_per_epoch)
        if epoch != self._epoch:
            documents = np.arange(len(self._pieces))
            self._order = np.arange(self.windows_per_epoch)
            if self._shuffle:
                random = np.random.default_rng((self._seed, epoch))
                random.shuffle(documents)
                random.shuffle(self._order)
            self._joined = np.concatenate([self._pieces[i] for i in documents])
            self._epoch = epoch
        start = int(self._order[offset]) * self._window
        return torch.from_numpy(self._joined[start : start + self._window])

    def batch(self, step: int, size: int) -> torch.Tensor:
        """The ``size`` windows of training step ``step``, int64 ``[size, window]``."""
        return torch.stack([self.window(step * size + row) for row in range(size)])

    def epoch(self) -> Iterator[torch.Tensor]:
        """Every window of the first epoch, each int64 ``[window]``."""
        return (self.window(index) for index in range(self.windows_per_epoch))
