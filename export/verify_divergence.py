"""Compare next-token distributions position by position, and sum up what was found.

The reference's log-probabilities lie in a folder, so that one evaluation serves many GGUF files;
they are read in portions, and a GGUF's logits are never stored. Statistics are those of
llama-perplexity --kl-divergence (llama.cpp, tools/perplexity/perplexity.cpp).
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from export._files import write_json
from export.verify_rows import Row

if TYPE_CHECKING:
    import numpy as np

LOG_PROBS_NAME = "log_probs.f32"
_ROWS_NAME = "rows.json"
# Two tokens this close (in nats) in the reference are a tie: rounding may choose either.
TIE = 0.02
# Below this many tokens of answers, perplexity is taken over all tokens.
_FEWEST_ANSWER_TOKENS = 200


@dataclass(frozen=True)
class ReferenceLogits:
    """What the reference says about every position of the rows: a folder that others read.

    Attributes:
        folder: Holds `log_probs.f32`, float32 of shape (positions, vocab_size).
        source: Where the rows are from, for a certificate.
    """

    folder: Path
    vocab_size: int
    rows: tuple[Row, ...]
    source: str

    @property
    def positions(self) -> int:
        """Count the evaluated tokens."""
        return sum(len(row.ids) for row in self.rows)

    @property
    def longest(self) -> int:
        """Give the length of the longest row, in tokens."""
        return max((len(row.ids) for row in self.rows), default=0)

    def save(self) -> None:
        """Write everything but the log-probabilities."""
        rows = [asdict(row) for row in self.rows]
        content = {"vocab_size": self.vocab_size, "source": self.source, "rows": rows}
        write_json(self.folder / _ROWS_NAME, content)

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Read what `save` wrote."""
        content = json.loads((folder / _ROWS_NAME).read_text(encoding="utf-8"))
        rows = tuple(read_row(row) for row in content["rows"])
        return cls(folder, content["vocab_size"], rows, content["source"])

    def log_probs(self, first: int, count: int) -> "np.ndarray":
        """Read positions from the file; they are not mapped, so they cost no more than they are.

        Returns:
            float32, shape (count, vocab_size).
        """
        import numpy as np

        path = self.folder / LOG_PROBS_NAME
        skip = first * self.vocab_size * 4
        values = np.fromfile(path, np.float32, count * self.vocab_size, offset=skip)
        return values.reshape(count, self.vocab_size)


def read_row(content: Mapping[str, Any]) -> Row:
    """Make a row of its JSON form."""
    answers = [(start, end) for start, end in content["answers"]]
    return Row(list(content["ids"]), answers, list(content["speaks"]))


@dataclass
class Positions:
    """Findings by position, all of one length.

    Attributes:
        kl: KL(reference || GGUF), nats.
        same: The likeliest token is the same.
        gap: How much likelier the reference's first choice is, to the reference, than the
            GGUF's, nats; 0 where they are the same.
        nll_reference: -ln p of the token that follows, NaN where none does.
        nll_gguf: The same of the GGUF.
        answer: The token that follows is the assistant's.
        speaks: It is the first of an answer.
    """

    kl: list[float]
    same: list[bool]
    gap: list[float]
    nll_reference: list[float]
    nll_gguf: list[float]
    answer: list[bool]
    speaks: list[bool]

    @classmethod
    def empty(cls) -> Self:
        """Begin with none."""
        return cls(*([] for _ in fields(cls)))

    def add(
        self, row: Row, start: int, reference: "np.ndarray", logits: "np.ndarray", width: int
    ) -> None:
        """Compare a portion of a row.

        Args:
            row: The row.
            start: Its first position in this portion.
            reference: Log-probabilities, float32 (n, V).
            logits: The GGUF's, float32 (n, V'); overwritten.
            width: The tokens that both sides know, min(V, V').
        """
        import numpy as np

        p_log, q = reference[:, :width], logits[:, :width]
        if width < reference.shape[1]:
            p_log = p_log - np.log(np.exp(p_log).sum(axis=1, dtype=np.float64, keepdims=True))
        q -= q.max(axis=1, keepdims=True)
        # Sums in float64: KL is a small difference of large sums.
        q_sum = np.log(np.exp(q).sum(axis=1, dtype=np.float64))
        p = np.exp(p_log)
        total = p.sum(axis=1, dtype=np.float64)
        kl = (p * (p_log - q)).sum(axis=1, dtype=np.float64) / total + q_sum
        each = np.arange(len(q))
        p_best, q_best = p_log.argmax(axis=1), q.argmax(axis=1)
        following = row.ids[start + 1 : start + 1 + len(q)]
        known = each[: len(following)]
        nlls = np.full((2, len(q)), np.nan)
        nlls[0, known] = -p_log[known, following]
        nlls[1, known] = q_sum[known] - q[known, following]
        self.kl += kl.tolist()
        self.same += (p_best == q_best).tolist()
        self.gap += (p_log[each, p_best] - p_log[each, q_best]).tolist()
        self.nll_reference += nlls[0].tolist()
        self.nll_gguf += nlls[1].tolist()
        places = range(start, start + len(q))
        self.answer += [any(a <= at + 1 < b for a, b in row.answers) for at in places]
        self.speaks += [at in row.speaks for at in places]


@dataclass(frozen=True)
class KlSummary:
    """How far a GGUF is from its reference. Errors are standard errors; KL is in nats per token.

    Attributes:
        mean: Of KL(reference || GGUF).
        same_top: Share of positions whose likeliest token is the same.
        ratio: PPL(GGUF) / PPL(reference).
        tokens: How many the perplexities are of.
        over: "answers", or "all" tokens where few answers are known.
        speaks: Positions at which an answer begins.
        speaks_equal: Those with the same likeliest token, ties included.
    """

    positions: int
    mean: float
    error: float
    median: float
    p99: float
    p999: float
    max: float
    same_top: float
    same_top_error: float
    ratio: float
    ratio_error: float
    perplexity_reference: float
    perplexity_gguf: float
    tokens: int
    over: str
    speaks: int
    speaks_equal: int


def summarize(found: Positions) -> KlSummary:
    """Sum up positions; NaN anywhere makes the numbers NaN."""
    import numpy as np

    kl = np.array(found.kl)
    same = np.array(found.same, dtype=float)
    quantiles = np.quantile(kl, [0.5, 0.99, 0.999, 1.0]) if len(kl) else [math.nan] * 4
    share = float(same.mean()) if len(same) else math.nan
    followed = ~np.isnan(np.array(found.nll_reference))
    answer = np.array(found.answer, dtype=bool) & followed
    over = "answers" if answer.sum() >= _FEWEST_ANSWER_TOKENS else "all"
    chosen = answer if over == "answers" else followed
    theirs, ours = np.array(found.nll_reference)[chosen], np.array(found.nll_gguf)[chosen]
    ratio, ratio_error = _perplexity_ratio(ours, theirs)
    speaks = np.array(found.speaks, dtype=bool)
    return KlSummary(
        positions=len(kl),
        mean=_mean(kl),
        error=_standard_error(kl),
        median=float(quantiles[0]),
        p99=float(quantiles[1]),
        p999=float(quantiles[2]),
        max=float(quantiles[3]),
        same_top=share,
        same_top_error=math.sqrt(share * (1 - share) / max(1, len(same) - 1)),
        ratio=ratio,
        ratio_error=ratio_error,
        perplexity_reference=_exp(_mean(theirs)),
        perplexity_gguf=_exp(_mean(ours)),
        tokens=len(theirs),
        over=over,
        speaks=int(speaks.sum()),
        speaks_equal=int((np.array(found.gap)[speaks] <= TIE).sum()),
    )


def _perplexity_ratio(ours: "np.ndarray", theirs: "np.ndarray") -> tuple[float, float]:
    """PPL(Q)/PPL(ref) and its error, from the covariance of the paired log-likelihoods.

    Both sides find the same tokens hard, so the ratio is known far better than either of the two.
    """
    import numpy as np

    if len(ours) < 2:
        return math.nan, math.nan
    variance = np.cov(np.stack([ours, theirs]), bias=True) / (len(ours) - 1)
    error = math.sqrt(max(0.0, variance[0, 0] + variance[1, 1] - 2 * variance[0, 1]))
    ratio = _exp(_mean(ours) - _mean(theirs))
    return ratio, ratio * error


def _exp(value: float) -> float:
    return math.exp(value) if not value > 700 else math.inf


def _mean(values: "np.ndarray | Sequence[float]") -> float:
    return float(sum(values) / len(values)) if len(values) else math.nan


def _standard_error(values: "np.ndarray") -> float:
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan
