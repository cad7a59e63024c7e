"""Conversations for benches: turns that begin with all that was said before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cluster.bench.arrival_trace import Arrival


@dataclass(frozen=True)
class ConversationShape:
    """What conversations are like; counts of tokens are means unless said otherwise.

    Attributes:
        num_conversations: in all.
        starts_per_second: on average, at random times.
        num_system_prompts: each conversation begins with one of so many.
        system_tokens: length of each of them.
        mean_turns: of a conversation, at least one, geometric.
        message_tokens: of a user's message behind the opening one, exponential.
        think_s: between an answer and the next message, exponential.
        max_context: no turn makes prompt and answer longer.
        vocab_size: ids are below it.
    """

    num_conversations: int = 300
    starts_per_second: float = 2.5
    num_system_prompts: int = 8
    system_tokens: int = 64
    mean_turns: float = 4.0
    message_tokens: float = 60.0
    think_s: float = 15.0
    max_context: int = 4096
    vocab_size: int = 32_000


@dataclass(frozen=True)
class Turn:
    """A message and what is answered to it, and how long the user thought before it."""

    think_s: float
    message: tuple[int, ...]
    answer: tuple[int, ...]


@dataclass(frozen=True)
class Conversation:
    """When it starts, in seconds, the system prompt, and its turns."""

    start_s: float
    system: tuple[int, ...]
    turns: tuple[Turn, ...]


def make_conversations(
    shape: ConversationShape, lengths: Sequence[Arrival], seed: int
) -> list[Conversation]:
    """Draws conversations of random tokens.

    Args:
        lengths: whose prompts are opening messages, and whose outputs answers, drawn at random.
    """
    rng = np.random.default_rng(seed)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(rng.integers(0, shape.vocab_size, count).tolist())

    systems = [tokens(shape.system_tokens) for _ in range(shape.num_system_prompts)]
    starts = np.cumsum(rng.exponential(1.0 / shape.starts_per_second, shape.num_conversations))
    conversations = []
    for start_s in starts.tolist():
        system = systems[rng.integers(len(systems))]
        left = shape.max_context - len(system)
        turns: list[Turn] = []
        for index in range(int(rng.geometric(1.0 / shape.mean_turns))):
            drawn = lengths[int(rng.integers(len(lengths)))]
            num_message = drawn.num_prompt_tokens
            if index:
                num_message = 1 + int(rng.exponential(shape.message_tokens))
            num_answer = max(drawn.num_output_tokens, 1)
            num_message = min(num_message, max(left // 2, 1)) if not index else num_message
            if num_message + num_answer > left:
                if turns:
                    break
                num_answer = left - num_message
            left -= num_message + num_answer
            think_s = float(rng.exponential(shape.think_s)) if index else 0.0
            turns.append(Turn(think_s, tokens(num_message), tokens(num_answer)))
        conversations.append(Conversation(start_s, system, tuple(turns)))
    return conversations


def repeated_share(conversations: Sequence[Conversation]) -> float:
    """Share of all prompts' tokens that were in the prompt or the answer before: what could be
    cached at best, but for system prompts of other conversations."""
    num_prompt_tokens = num_repeated = 0
    for conversation in conversations:
        length = len(conversation.system)
        for index, turn in enumerate(conversation.turns):
            num_repeated += length if index else 0
            num_prompt_tokens += length + len(turn.message)
            length += len(turn.message) + len(turn.answer)
    return num_repeated / num_prompt_tokens


def generated_lengths(seed: int, count: int = 1000) -> list[Arrival]:
    """Lengths like those of a chat service where no trace is at hand: log-normal, medians of 600
    prompt tokens and 120 output tokens."""
    rng = np.random.default_rng(seed)
    prompts = np.clip(rng.lognormal(np.log(600), 0.9, count), 8, 4000).astype(int)
    outputs = np.clip(rng.lognormal(np.log(120), 0.8, count), 1, 1000).astype(int)
    return [
        Arrival(0.0, int(prompt), int(output))
        for prompt, output in zip(prompts, outputs, strict=True)
    ]
