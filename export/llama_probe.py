"""The child process of export.verify_gguf: all that llama.cpp does with a file.

A damaged file, or a tokenizer that does not fit, makes llama.cpp abort its whole process: better
this one than the one that asks.

In: a job file (JSON). Out: `result.json` and `logits.npz` in the job's folder; `phase.txt` says how
far it came.

Run: python -m export.llama_probe JOB.json (by export.verify_gguf)
"""

import argparse
import json
from pathlib import Path
from typing import Any

from export._cli import MODEL, OK, CommandError, run_command
from export.plain_tokens import of_llama_cpp


def probe(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Load a GGUF, tokenize, render, evaluate, generate; logits go to `logits.npz`.

    Args:
        job: `gguf`, `texts`, `conversations`, `prompts` (token ids to evaluate),
            `stop_conversation`, `max_new_tokens`, `n_threads`.
        folder: Where to write.

    Raises:
        CommandError: Exit 3: llama.cpp does not load the file.
    """
    import llama_cpp
    import numpy as np

    def enter(phase: str) -> None:
        (folder / "phase.txt").write_text(phase, encoding="utf-8")

    enter("loading")
    longest = max([len(ids) for ids in job["prompts"]] + [256])
    try:
        model = llama_cpp.Llama(
            job["gguf"],
            n_ctx=longest + job["max_new_tokens"],
            logits_all=True,
            verbose=False,
            n_threads=job["n_threads"] or None,
            n_threads_batch=job["n_threads"] or None,
        )
    except ValueError as error:
        raise CommandError(f"llama.cpp cannot load the file: {error}", MODEL) from error
    result: dict[str, Any] = {
        "n_vocab": model.n_vocab(),
        "bos_id": model.token_bos(),
        "eos_id": model.token_eos(),
        "eos_stops": _is_end(model, model.token_eos()),
        "version": llama_cpp.__version__,
    }

    enter("tokenizing")
    plain = of_llama_cpp(model)
    result["text_ids"] = [plain.text_ids(text) for text in job["texts"]]

    enter("rendering the chat template")
    result["chat_ids"] = [plain.chat_ids(chat) for chat in job["conversations"]]

    enter("evaluating")
    logits = []
    for ids in job["prompts"]:
        model.reset()
        model.eval(ids)
        logits.append(model.scores[: len(ids)].copy())
    np.savez(folder / "logits.npz", *logits)

    enter("generating")
    prompt = plain.chat_ids(job["stop_conversation"])
    result["stop"] = _generate(model, prompt, job["max_new_tokens"])
    enter("done")
    return result


def _is_end(model: Any, token: int) -> bool:
    import llama_cpp

    vocab = llama_cpp.llama_model_get_vocab(model.model)
    return token >= 0 and bool(llama_cpp.llama_vocab_is_eog(vocab, token))


def _generate(model: Any, prompt: list[int] | str, max_new_tokens: int) -> dict[str, Any]:
    if isinstance(prompt, str):
        return {"stopped": False, "tokens": 0, "text": prompt}
    tokens: list[int] = []
    stopped = False
    model.reset()
    for token in model.generate(prompt, temp=0.0, repeat_penalty=1.0):
        if _is_end(model, token):
            stopped = True
            break
        tokens.append(token)
        if len(tokens) >= max_new_tokens:
            break
    text = model.detokenize(tokens).decode("utf-8", errors="replace")
    return {"stopped": stopped, "tokens": len(tokens), "text": text[:200]}


def build_parser() -> argparse.ArgumentParser:
    """Build the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m export.llama_probe",
        description="Child process of export.verify_gguf: runs one job on one GGUF.",
    )
    parser.add_argument("job", type=Path, help="job file (JSON); results are written beside it")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one job; exit codes: 0 done, 3 the file does not load."""
    args = build_parser().parse_args(argv)
    job = json.loads(args.job.read_text(encoding="utf-8"))
    folder = args.job.parent
    result = probe(job, folder)
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")
    return OK


if __name__ == "__main__":
    run_command(main)
