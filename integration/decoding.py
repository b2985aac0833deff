"""How an answer is decoded and what is recorded of it."""

import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from integration._cli import CONTEXT, CommandError

MIN_ANSWER_TOKENS = 16


def draw_seed() -> int:
    """Draw a seed from the system's randomness; llama.cpp's own default is always the same."""
    return random.SystemRandom().randrange(1, 2**31)


def answer_room(prompt_tokens: int, max_tokens: int, n_ctx: int) -> int:
    """Give the tokens an answer may have.

    Raises:
        CommandError: Exit 4; the prompt does not fit into the context.
    """
    room = n_ctx - prompt_tokens
    if room < MIN_ANSWER_TOKENS:
        raise CommandError(
            f"the prompt has {prompt_tokens} tokens, the context {n_ctx} and an answer needs at "
            f"least {MIN_ANSWER_TOKENS}; shorten the prompt or the history",
            CONTEXT,
        )
    return min(max_tokens, room)


@dataclass
class Settings:
    """How to decode: ``max_tokens`` in tokens, ``timeout_s`` in seconds (0 = none).

    ``seed`` repeats an answer; without one it is drawn and recorded in the ``Answer``. With
    ``free_calls`` no grammar holds a call, to see what the model does by itself.
    """

    max_tokens: int = 512
    temperature: float = 0.2
    top_p: float = 0.9
    top_k: int = 40
    min_p: float = 0.05
    repeat_penalty: float = 1.1
    stop: Sequence[str] = ()
    timeout_s: float = 0.0
    seed: int | None = None
    free_calls: bool = False

    def deadline(self) -> float:
        """Give the ``time.monotonic()`` at which an answer that begins now has to end."""
        return time.monotonic() + self.timeout_s if self.timeout_s else math.inf

    def chosen_seed(self) -> int:
        """Give the seed, drawn where none is given."""
        return draw_seed() if self.seed is None else self.seed


@dataclass
class Answer:
    """One decoded answer with what stock LlamaCpp throws away.

    Attributes:
        text: The answer, without end-of-turn token or stop string.
        finish_reason: ``stop``, ``length`` or ``timeout``.
        prompt_tokens: Tokens of the prompt.
        completion_tokens: Tokens that were generated.
        first_token_s: Seconds until the first token.
        decode_s: Seconds from the first token to the end.
        seed: What the sampler was seeded with.
    """

    text: str = ""
    finish_reason: str = "stop"
    prompt_tokens: int = 0
    completion_tokens: int = 0
    first_token_s: float = 0.0
    decode_s: float = 0.0
    seed: int = 0

    @property
    def tokens_per_second(self) -> float:
        """Decoding speed after the first token."""
        return (self.completion_tokens - 1) / self.decode_s if self.decode_s > 0 else 0.0


@dataclass
class StopScanner:
    """Hold back text that may be the start of a stop string."""

    stops: Sequence[str]
    pending: str = field(default="")

    def push(self, text: str) -> tuple[str, bool]:
        """Take decoded text; give what may be shown and whether a stop string was met."""
        self.pending += text
        hits = [at for at in (self.pending.find(stop) for stop in self.stops if stop) if at >= 0]
        if hits:
            shown, self.pending = self.pending[: min(hits)], ""
            return shown, True
        held = max(
            (
                size
                for stop in self.stops
                for size in range(1, len(stop))
                if self.pending.endswith(stop[:size])
            ),
            default=0,
        )
        cut = len(self.pending) - held
        shown, self.pending = self.pending[:cut], self.pending[cut:]
        return shown, False
