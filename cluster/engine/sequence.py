"""One request while it is being served."""

from __future__ import annotations

from dataclasses import dataclass, field

from cluster.engine.draft_client import SessionKey
from cluster.engine.text import TextStream
from cluster.request import Request, SpeculationStats
from cluster.speculation.proposal import DraftProposal


@dataclass(eq=False)
class Sequence:
    """Mutable state of a request; only the engine's thread touches it.

    Invariant between steps: positions ``0 .. num_computed_tokens-1`` are in the KV cache, and once
    the prompt is done ``num_computed_tokens == len(token_ids) - 1`` (the anchor has no keys yet).

    Attributes:
        token_ids: prompt and output; ``num_prompt_tokens`` of them are the prompt.
        pages: KV pages held, in order of position.
        group: which of the groups in flight it belongs to while it runs.
        is_in_flight: part of a pass that is under way (its pages must not be touched).
        end_error: set when it must end without finishing; acted on between passes.
        text: present where stop strings must be looked for.
    """

    request: Request
    token_ids: list[int]
    num_prompt_tokens: int
    max_output_tokens: int
    num_computed_tokens: int = 0
    pages: list[int] = field(default_factory=list)
    group: int = 0
    is_in_flight: bool = False
    end_error: Exception | None = None
    text: TextStream | None = None
    stats: SpeculationStats = field(default_factory=SpeculationStats)
    proposal: DraftProposal | None = None
    session: SessionKey | None = None
    session_epoch: int = 0
    num_fed_features: int = 0
    num_bulk_features: int = 0

    @property
    def num_output_tokens(self) -> int:
        """Output tokens so far, resumed ones included."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_missing_tokens(self) -> int:
        """Committed tokens that are not in the KV cache yet (1 while decoding)."""
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def room(self) -> int:
        """Output tokens that may still follow."""
        return self.max_output_tokens - self.num_output_tokens
