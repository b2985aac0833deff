"""Chat on a GGUF: ours against raw llama-cpp-python, stock LangChain, and ourselves without a feature.

    python -m scripts.benchmark chat                # on the demo's Q8_0; --model FILE for another

What is compared, contenders in turn, in an order that changes from round to round:

- decoding, tokens per second between the first and the last: `integration.ask --json` and LangChain's
  ``.stream`` on our ``SafeLlamaCpp`` against raw llama-cpp-python, same prompt, threads and sampling;
- decoding a tool call under its grammar against decoding an answer freely;
- the wait for the first token of a conversation's second turn behind a long system prompt, and of the
  same turn in a new process, against evaluating that prompt whole;
- the wait for the first token of a long prompt against stock LangChain ``LlamaCpp`` with its defaults;
- a batch of requests against the same one after another, and against a process for each.

Our side runs in processes of its own, for `scripts` imports nothing of `integration`. None finds a
prefix that an earlier one evaluated, but for the new process of the second turn.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts._cli import FAILED, CommandError, log
from scripts.benchmark_chat_child import OURS_BACKEND, OURS_LANGCHAIN, OURS_RESTART
from scripts.machine import usable_threads

DEMO_MODEL = Path("outputs/smollm2-135m-cpu/gguf/SmolLM2-135M-Instruct-cpu-v1.0-Q8_0.gguf")
DECODE_TARGET, GRAMMAR_TARGET, REUSE_TARGET, PREFILL_TARGET, BATCH_TARGET = 0.97, 0.9, 20, 1.6, 1.0
N_CTX = 2048
SEED = 1
# What `integration.ask` decodes with.
SAMPLING = {"temperature": 0.2, "top_p": 0.9, "top_k": 40, "min_p": 0.05, "repeat_penalty": 1.1}
STORY = "Write a long story about a lighthouse keeper who finds a map. Describe every day of his journey."
SENTENCE = (
    "A model reads its prompt before it writes the first word, and a long prompt takes long. "
)
SUBJECTS = ("rain", "bread", "a bridge", "the moon", "a violin", "salt", "a river", "glass")
QUESTIONS = ("What is {}?", "Name a use of {}.", "Describe {} to a child.", "Write about {}.")


@dataclass(frozen=True)
class Amounts:
    """How much work a round is; ``answer``, ``system`` and ``request`` are tokens."""

    answer: int = 200
    repeats: int = 3  # under a grammar and freely, in turn
    copied: int = 9  # sentences of the text that the call copies
    system: int = 900
    sentences: int = 45  # of the long prompt
    request: int = 48
    requests: int = 32
    processes: int = 3  # measured for ``requests`` of them


FULL = Amounts()
QUICK = Amounts(
    answer=16, repeats=1, copied=2, system=100, sentences=5, request=6, requests=4, processes=1
)


class Contenders:
    """Everything that is measured on one model.

    Args:
        model: A GGUF with a chat template.
        amounts: How much work.
        folder: An empty one, for caches.
    """

    def __init__(self, model: Path, amounts: Amounts, folder: Path) -> None:
        self.model, self.amounts, self.folder = model, amounts, folder
        self.threads = usable_threads()
        self._job = {
            "model": str(model),
            "n_ctx": N_CTX,
            "threads": self.threads,
            "seed": SEED,
            "sampling": SAMPLING,
            "max_tokens": amounts.answer,
        }
        self._prompt, self._prompt_tokens = "", 0
        # What is asked with it has no system prompt, so nothing evaluated is kept there.
        self._cache = folder / "common"

    def measure_round(self, number: int) -> dict[str, float]:
        """Measure everything once; who begins depends on the number of the round."""
        groups: list[list[Callable[[], dict[str, float]]]] = [
            [self.decode_raw, self.decode_ask, self.decode_langchain],
            [self.converse],
            [self.prefill_ours, self.prefill_stock],
            [self.answer_batch, self.answer_in_turn, self.answer_in_processes],
        ]
        figures: dict[str, float] = {}
        for group in groups:
            for measure in group[:: -1 if number % 2 else 1]:
                figures |= measure()
        return figures

    def decode_raw(self) -> dict[str, float]:
        """Decode with llama-cpp-python alone; it begins, for the others get the prompt it rendered."""
        answer = self._usual("raw", question=STORY)
        self._prompt, self._prompt_tokens = answer["prompt"], answer["prompt_tokens"]
        speed = self._speed("raw", answer, answer["completion_tokens"])
        return {"decode_raw_tokens_per_second": speed}

    def decode_ask(self) -> dict[str, float]:
        """Decode with the command."""
        (answer,) = self._ask(STORY, max_tokens=self.amounts.answer)
        usage = answer["usage"]
        if usage["prompt_tokens"] != self._prompt_tokens:
            raise CommandError(
                f"the same prompt has {self._prompt_tokens} tokens in raw llama-cpp-python and "
                f"{usage['prompt_tokens']} in integration.ask; expected the same",
                FAILED,
            )
        speed = self._speed("integration.ask", answer["timings"], usage["completion_tokens"])
        return {"decode_ask_tokens_per_second": speed}

    def decode_langchain(self) -> dict[str, float]:
        """Decode through LangChain's streaming interface."""
        answer = self._ours("our LangChain class", OURS_LANGCHAIN, prompt=self._prompt)
        speed = self._speed("our LangChain class", answer, answer["completion_tokens"])
        return {"decode_langchain_tokens_per_second": speed}

    def converse(self) -> dict[str, float]:
        """Decode under a grammar and freely; wait for a second turn, in three ways."""
        amounts, cache = self.amounts, Path(tempfile.mkdtemp(dir=self.folder))
        text = " ".join(f"{number}. {SENTENCE.strip()}" for number in range(amounts.copied))
        job = {"system_tokens": amounts.system, "repeats": amounts.repeats}
        found = self._ours("our backend", OURS_BACKEND, cache, text=text, sentence=SENTENCE, **job)
        again = self._ours("our backend", OURS_RESTART, cache, messages=found["messages"])
        return {
            "decode_free_tokens_per_second": found["free"],
            "decode_constrained_tokens_per_second": found["constrained"],
            "first_token_whole_prompt_s": found["whole"],
            "first_token_second_turn_s": found["second"],
            "first_token_new_process_s": again["restarted"],
        }

    def prefill_ours(self) -> dict[str, float]:
        """Wait for the first token of a long prompt, after another request."""
        requests = ["warm up", SENTENCE * self.amounts.sentences]
        answers = self._ask(*requests, options=["--jsonl", "--parallel", "1"], max_tokens=1)
        return {"prefill_ours_s": answers[1]["timings"]["first_token_s"]}

    def prefill_stock(self) -> dict[str, float]:
        """Wait for the same with LangChain's defaults."""
        answer = self._usual("stock", question=SENTENCE * self.amounts.sentences)
        return {"prefill_stock_s": answer["first_token_s"]}

    def answer_batch(self) -> dict[str, float]:
        """Answer many requests, as many side by side as the command likes."""
        return {"batch_tokens_per_second": self._throughput(self.requests(), ["--jsonl"])}

    def answer_in_turn(self) -> dict[str, float]:
        """Answer the same one after another in one process."""
        options = ["--jsonl", "--parallel", "1"]
        return {"in_turn_tokens_per_second": self._throughput(self.requests(), options)}

    def answer_in_processes(self) -> dict[str, float]:
        """Answer some of them in a process each."""
        some = self.requests()[:: self.amounts.requests // self.amounts.processes]
        speeds = [self._throughput([request], ["--json"]) for request in some]
        return {"processes_tokens_per_second": statistics.harmonic_mean(speeds)}

    def requests(self) -> list[str]:
        """Give short questions, each another one."""
        all_of_them = [question.format(subject) for question in QUESTIONS for subject in SUBJECTS]
        return all_of_them[: self.amounts.requests]

    def _throughput(self, requests: Sequence[str], options: Sequence[str]) -> float:
        """Give tokens of answers per second of the whole process, start and loading included."""
        started = time.monotonic()
        answers = self._ask(*requests, options=options, max_tokens=self.amounts.request)
        seconds = time.monotonic() - started
        return sum(answer["usage"]["completion_tokens"] for answer in answers) / seconds

    def _speed(self, who: str, answer: Mapping[str, Any], tokens: int) -> float:
        if tokens < self.amounts.answer // 2:
            raise CommandError(
                f"{who} ended its answer after {tokens} tokens, expected {self.amounts.answer} to "
                "measure; choose a model that writes longer answers: --model",
                FAILED,
            )
        return float(answer["tokens_per_second"])

    def _ask(
        self, *requests: str, max_tokens: int, options: Sequence[str] = ("--json",)
    ) -> list[dict[str, Any]]:
        command = [sys.executable, "-m", "integration.ask", "--model", str(self.model), *options]
        command += ["--n-ctx", str(N_CTX), "--threads", str(self.threads), "--seed", str(SEED)]
        command += ["--max-tokens", str(max_tokens)]
        is_batch = "--jsonl" in options
        lines = "".join(json.dumps(request) + "\n" for request in requests)
        output = run_child(
            "integration.ask", command, lines if is_batch else requests[0], self._cache
        )
        answers = (
            [json.loads(line) for line in output.splitlines()] if is_batch else [json.loads(output)]
        )
        if len(answers) != len(requests):
            raise CommandError(
                f"integration.ask gave {len(answers)} answers to {len(requests)}", FAILED
            )
        return answers

    def _ours(self, what: str, code: str, cache: Path | None = None, **job: Any) -> dict[str, Any]:
        command = [sys.executable, "-c", code]
        job_text = json.dumps(self._job | job)
        return json.loads(run_child(what, command, job_text, cache or self._cache))

    def _usual(self, contender: str, **job: Any) -> dict[str, Any]:
        command = [sys.executable, "-m", "scripts.benchmark_chat_child", contender]
        return json.loads(run_child(contender, command, json.dumps(self._job | job), self._cache))


def run_child(what: str, command: Sequence[str], stdin: str, cache: Path) -> str:
    """Run a contender's process; give its output.

    Args:
        what: What to call it if it fails.
        command: Its command line.
        stdin: What it reads.
        cache: Where it keeps evaluated prefixes.

    Raises:
        CommandError: Exit 1, with the last line that it said.
    """
    env = {**os.environ, "TOMEFORGE_CACHE": str(cache)}
    done = subprocess.run(
        command, input=stdin, capture_output=True, text=True, check=False, env=env
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise CommandError(f"{what} failed: {reason.removeprefix('error: ')}", FAILED)
    return done.stdout


def judge_chat(figures: Mapping[str, float]) -> list[dict[str, Any]]:
    """Compare medians with the targets; each is a ratio that is to be large.

    Args:
        figures: What ``Contenders`` measures, by name.
    """

    def target(name: str, above: str, below: str, limit: float) -> dict[str, Any]:
        value = figures[above] / figures[below]
        return {"name": name, "value": round(value, 3), "target": limit, "met": value >= limit}

    speed, wait = "_tokens_per_second", "first_token_whole_prompt_s"
    decode, batch = f"decode_raw{speed}", f"batch{speed}"
    return [
        target("decode: ask / raw", f"decode_ask{speed}", decode, DECODE_TARGET),
        target("decode: LangChain stream / raw", f"decode_langchain{speed}", decode, DECODE_TARGET),
        target(
            "decode: under a grammar / free",
            f"decode_constrained{speed}",
            f"decode_free{speed}",
            GRAMMAR_TARGET,
        ),
        target(
            "second turn: whole prompt / reused", wait, "first_token_second_turn_s", REUSE_TARGET
        ),
        target(
            "second turn in a new process: whole prompt / reused",
            wait,
            "first_token_new_process_s",
            REUSE_TARGET,
        ),
        target(
            "prefill: stock seconds / our seconds",
            "prefill_stock_s",
            "prefill_ours_s",
            PREFILL_TARGET,
        ),
        target("batch / one after another", batch, f"in_turn{speed}", BATCH_TARGET),
        target("batch / a process each", batch, f"processes{speed}", BATCH_TARGET),
    ]


def benchmark_chat(model: Path, num_rounds: int, quick: bool = False) -> dict[str, Any]:
    """Measure everything in every round.

    Args:
        model: A GGUF with a chat template.
        num_rounds: Medians are of so many.
        quick: Small amounts, for tests: no targets, for the figures say nothing.

    Returns:
        The object of the contract; ``metrics`` holds medians.
    """
    amounts = QUICK if quick else FULL
    rounds = []
    with tempfile.TemporaryDirectory() as folder:
        contenders = Contenders(model, amounts, Path(folder))
        for number in range(num_rounds):
            rounds.append(contenders.measure_round(number))
            shown = ", ".join(f"{key} {value:.4g}" for key, value in rounds[-1].items())
            log(f"round {number + 1}/{num_rounds}: {shown}")
    figures = {key: statistics.median(one[key] for one in rounds) for key in rounds[0]}
    return {
        "benchmark": "chat",
        "metrics": {
            **{key: round(value, 4) for key, value in figures.items()},
            "requests": amounts.requests,
            "threads": contenders.threads,
            "rounds": num_rounds,
        },
        "targets": [] if quick else judge_chat(figures),
    }
