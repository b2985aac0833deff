"""The contenders of the chat benchmark, each for a process of its own.

    python -m scripts.benchmark_chat_child raw < job.json      # llama-cpp-python, nothing around it
    python -m scripts.benchmark_chat_child stock < job.json    # LangChain's LlamaCpp with its defaults

A job is a JSON object on standard input; the figures are one on standard output. Ours are texts for
``python -c``: `scripts` imports nothing of `integration`.
"""

import argparse
import json
import sys
import time
import warnings
from collections.abc import Sequence
from typing import Any

from scripts._cli import FAILED, OK, CommandError, run_command

N_BATCH = 512

OURS_LANGCHAIN = """
import json, sys, time
from langchain_core.callbacks import BaseCallbackHandler
from integration.llm import SafeLlamaCpp

class Counter(BaseCallbackHandler):
    def on_llm_end(self, response, **_):
        self.tokens = response.generations[0][0].generation_info["completion_tokens"]

job, counter = json.load(sys.stdin), Counter()
job["sampling"].pop("min_p")  # no field of LangChain's class; ours decodes with the same one
model = SafeLlamaCpp(
    model_path=job["model"], n_ctx=job["n_ctx"], n_threads=job["threads"], seed=job["seed"],
    max_tokens=job["max_tokens"], **job["sampling"],
)
times = [time.monotonic() for _ in model.stream(job["prompt"], {"callbacks": [counter]})]
speed = (counter.tokens - 1) / (times[-1] - times[0])
print(json.dumps({"tokens_per_second": speed, "completion_tokens": counter.tokens}))
"""

_OURS_SETUP = """
import json, sys, time
from integration.backend import run
from integration.decoding import Settings
from integration.models import load_model

def first_token(messages, max_tokens=8):
    stream = model.stream(model.turn(messages, Settings(max_tokens=max_tokens, seed=job["seed"])))
    started = time.monotonic()
    text = next(stream)
    return time.monotonic() - started, text + "".join(stream)

def user(text):
    return {"role": "user", "content": text}

job = json.load(sys.stdin)
model = load_model(job["model"], n_ctx=job["n_ctx"], n_threads=job["threads"])
first_token([user("warm up")])
"""

OURS_RESTART = f"""{_OURS_SETUP}
print(json.dumps({{"restarted": first_token(job["messages"])[0]}}))
"""

OURS_BACKEND = (
    _OURS_SETUP
    + """
import statistics
from tools import TOOLS

def system(number, text=""):
    return {"role": "system", "content": f"You are helper {number}. {text}"}

figures = {"none": [], "text_formatter": []}
request = [user(f"Please wrap this to 60 columns: {job['text']}")]
settings = Settings(max_tokens=job["max_tokens"], seed=job["seed"])
for _ in range(job["repeats"]):
    for choice, speeds in figures.items():
        answer = run(model, model.turn(request, settings, TOOLS, choice)).answer
        speeds.append(answer.tokens_per_second)
free, constrained = map(statistics.median, figures.values())

text = ""
while model.count_tokens([system(1, text), user("Hi")]) < job["system_tokens"]:
    text += job["sentence"]
turns = [user("Hi")]
reply = first_token([system(1, text), *turns])[1]
turns += [{"role": "assistant", "content": reply}, user("And you?")]
second, _ = first_token([system(1, text), *turns])
whole, _ = first_token([system(2, text), *turns])
first_token([system(1, text), turns[0]])
model.remember()  # as /save does
print(json.dumps({
    "free": free, "constrained": constrained, "second": second, "whole": whole,
    "messages": [system(1, text), *turns],
}))
"""
)


def _render(llama: Any, question: str) -> str:
    """Write the prompt of a conversation with the file's own chat template."""
    import llama_cpp
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    template = llama.metadata.get("tokenizer.chat_template")
    if template is None:
        raise CommandError("the model has no chat template; expected one, as exports have", FAILED)
    vocab = llama._model.vocab
    bos, eos = (
        "" if token < 0 else llama_cpp.llama_vocab_get_text(vocab, token).decode()
        for token in (llama.token_bos(), llama.token_eos())
    )
    prompt = Jinja2ChatFormatter(template, eos, bos)(
        messages=[{"role": "user", "content": question}]
    )
    return prompt.prompt


def run_raw(job: dict[str, Any]) -> dict[str, Any]:
    """Stream one answer; ``prompt`` is the text that it was given."""
    import llama_cpp

    threads = job["threads"]
    llama = llama_cpp.Llama(
        job["model"],
        n_ctx=job["n_ctx"],
        n_batch=N_BATCH,
        n_threads=threads,
        n_threads_batch=threads,
        verbose=False,
    )
    prompt = _render(llama, job["question"])
    ids = llama.tokenize(prompt.encode(), add_bos=False, special=True)
    chunks = llama.create_completion(
        ids, stream=True, max_tokens=job["max_tokens"], seed=job["seed"], **job["sampling"]
    )
    times = [time.monotonic() for _ in chunks]
    # What was evaluated behind the prompt: every token but the one that was sampled last.
    decoded = llama.n_tokens - len(ids)
    return {
        "tokens_per_second": decoded / (times[-1] - times[0]),
        "completion_tokens": decoded + 1,
        "prompt_tokens": len(ids),
        "prompt": prompt,
    }


def run_stock(job: dict[str, Any]) -> dict[str, Any]:
    """Read a long prompt with the defaults; only the context is raised, or it would be refused."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from langchain_community.llms import LlamaCpp
    model = LlamaCpp(model_path=job["model"], n_ctx=job["n_ctx"], verbose=False, max_tokens=1)
    model.invoke("warm up", max_tokens=1)
    started = time.monotonic()
    model.invoke(job["question"])
    return {"first_token_s": time.monotonic() - started}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one contender on the job from standard input."""
    parser = argparse.ArgumentParser(description="One contender of the chat benchmark.")
    parser.add_argument("contender", choices=["raw", "stock"], help="who answers")
    options = parser.parse_args(argv)
    run = {"raw": run_raw, "stock": run_stock}[options.contender]
    print(json.dumps(run(json.load(sys.stdin))))
    return OK


if __name__ == "__main__":
    run_command(main)
