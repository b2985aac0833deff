"""Certify a GGUF: does it load, tokenize, render and answer as the model it was made from?

In: a GGUF file; as reference the merged model folder or the adapter folder. Out: a certificate.

Run: python -m export.verify_gguf GGUF --reference DIR [--output certificate.json] [--timeout S]
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export._cli import FAILED, MODEL, OK, TIMEOUT, USAGE, CommandError, log, run_command
from export._files import os_errors_told, sha256_file, write_json
from export._process import QUIET_THREADS
from export.gguf_header import GgufHeader, read_gguf_header
from export.verify_checks import (
    Check,
    check_architecture,
    check_chat_prompts,
    check_chat_template,
    check_eos,
    check_logits,
    check_token_ids,
    check_vocabulary,
)
from export.verify_corpus import CONVERSATIONS, STOP_CONVERSATION, hard_texts
from export.verify_reference import Reference, open_reference

if TYPE_CHECKING:
    import numpy as np

DEFAULT_TIMEOUT_SECONDS = 900.0
MAX_NEW_TOKENS = 200


def verify_gguf(
    gguf_path: Path,
    reference_dir: Path,
    *,
    base_dir: Path | None = None,
    timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS,
    n_threads: int = 0,
) -> dict[str, Any]:
    """Run all checks and give the certificate.

    Args:
        gguf_path: The file to certify.
        reference_dir: The merged model, or the adapter the file was made from.
        base_dir: The adapter's 16-bit base, when the one that it names is not to be used.
        timeout_seconds: For everything together.
        n_threads: Of llama.cpp; 0 = its own choice.

    Raises:
        CommandError: Exit 3: the file or the reference is unusable. Exit 6: out of time.
    """
    started = time.monotonic()
    deadline = started + timeout_seconds
    header = read_gguf_header(gguf_path)
    with open_reference(reference_dir, base_dir) as reference:
        texts = hard_texts(list(reference.tokenizer.all_special_tokens))
        chats = [reference.plain.chat_ids(messages) for messages in CONVERSATIONS]
        vocab_size = min(reference.config.get("vocab_size", 0), header_vocabulary(header))
        prompts = [ids for ids in chats if isinstance(ids, list)] or [
            reference.plain.text_ids(messages[-1]["content"]) for messages in CONVERSATIONS
        ]
        prompts = [ids for ids in prompts if max(ids) < vocab_size]
        job = {
            "gguf": str(gguf_path.resolve()),
            "texts": texts,
            "conversations": CONVERSATIONS,
            "prompts": prompts,
            "stop_conversation": STOP_CONVERSATION,
            "max_new_tokens": MAX_NEW_TOKENS,
            "n_threads": n_threads,
        }
        probe, logits = run_probe(job, deadline)
        checks = [Check("loads", True, f"llama_cpp {probe['version']}", "no error")]
        checks += _static_checks(header, reference, probe)
        expected = [reference.plain.text_ids(text) for text in texts]
        checks.append(check_token_ids(texts, probe["text_ids"], expected))
        checks += check_chat_prompts(probe["chat_ids"], chats, reference.tokenizer.bos_token_id)
        _check_time(deadline)
        if prompts:
            checks += check_logits(header, logits, reference.logits(prompts))
        else:
            checks.append(Check("mean_kl", False, "no prompt fits the vocabulary", "measured"))
        _check_time(deadline)
    checks.append(Check("stops", True, probe["stop"]))
    return {
        "file": gguf_path.name,
        "bytes": header.file_bytes,
        "sha256": sha256_file(gguf_path),
        "type": header.type_name,
        "bits_per_weight": round(header.bits_per_weight, 3),
        "fallbacks": dict(header.fallbacks),
        "reference": str(reference_dir),
        "passed": all(check.passed for check in checks),
        "checks": [check.as_dict() for check in checks],
        "seconds": round(time.monotonic() - started, 1),
    }


def header_vocabulary(header: GgufHeader) -> int:
    """Give the number of tokens in the file."""
    tokens = header.metadata.get("tokenizer.ggml.tokens", 0)
    return tokens if isinstance(tokens, int) else len(tokens)


def _static_checks(header: GgufHeader, reference: Reference, probe: dict[str, Any]) -> list[Check]:
    return [
        check_architecture(header, reference.config),
        check_vocabulary(probe["n_vocab"], reference.config),
        check_eos(probe, reference.tokenizer.eos_token_id),
        check_chat_template(header, reference.tokenizer.chat_template),
    ]


def _check_time(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise CommandError("out of time; give it more: --timeout SECONDS", TIMEOUT)
    return left


def run_probe(job: dict[str, Any], deadline: float) -> "tuple[dict[str, Any], list[np.ndarray]]":
    """Run `export.llama_probe` in a child process, whose death is a finding, not ours.

    Raises:
        CommandError: Exit 3: it died or refused the file. Exit 6: out of time.
    """
    import numpy as np

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
        command = [sys.executable, "-m", "export.llama_probe", str(folder / "job.json")]
        try:
            done = subprocess.run(
                command,
                cwd=Path(__file__).parents[1],
                env={**QUIET_THREADS, **os.environ},
                capture_output=True,
                text=True,
                errors="replace",
                timeout=_check_time(deadline),
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise CommandError(
                f"out of time while {_phase(folder)}; give it more: --timeout SECONDS", TIMEOUT
            ) from None
        if done.returncode != 0:
            how = f"exit code {done.returncode}"
            if done.returncode < 0:
                how = f"killed by {signal.Signals(-done.returncode).name}"
            tail = [line.strip() for line in done.stderr.splitlines() if line.strip()][-5:]
            raise CommandError(
                f"'{job['gguf']}' is unusable: llama.cpp failed while {_phase(folder)} ({how}): "
                + " | ".join(tail),
                MODEL,
            )
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        with np.load(folder / "logits.npz") as arrays:
            logits = [arrays[key] for key in arrays.files]
    return result, logits


def _phase(folder: Path) -> str:
    path = folder / "phase.txt"
    return path.read_text(encoding="utf-8") if path.is_file() else "starting"


def write_certificate(certificate: dict[str, Any], gguf_path: Path, output: Path | None) -> Path:
    """Write a certificate: alone to `output`, else into the folder's `certificate.json`."""
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_json(output, certificate)
        return output
    path = gguf_path.parent / "certificate.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        files = dict(content["files"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        files = {}
    write_json(path, {"files": {**files, gguf_path.name: certificate}})
    return path


def format_table(certificate: dict[str, Any]) -> str:
    """Give the certificate as a table for people."""
    lines = [
        f"{certificate['file']}: {certificate['type']}, {certificate['bytes'] / 1e6:.1f} MB, "
        f"{certificate['bits_per_weight']:.2f} bits per weight"
    ]
    for check in certificate["checks"]:
        state = "ok" if check["passed"] else "FAILED"
        state = "note" if check["passed"] and check["threshold"] is None else state
        value = check["value"]
        if isinstance(value, dict):
            value = ", ".join(f"{key} {item!r}" for key, item in value.items() if key != "text")
        limit = "" if check["threshold"] is None else f"   (limit: {check['threshold']})"
        lines.append(f"  {state:<6} {check['name']:<15} {value}{limit}")
    lines.append(f"{'passed' if certificate['passed'] else 'FAILED'} in {certificate['seconds']} s")
    return "\n".join(lines)


def build_parser() -> argparse.ArgumentParser:
    """Build the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m export.verify_gguf",
        description="Compare a GGUF with the model it was made from: tokens, chat prompts, "
        "next-token distributions. Prints a certificate (JSON).",
    )
    parser.add_argument("gguf", type=Path, help="GGUF file")
    parser.add_argument(
        "--reference", type=Path, required=True, metavar="DIR", help="merged model, or adapter"
    )
    parser.add_argument(
        "--base", type=Path, metavar="DIR", help="the adapter's base (default: the one it names)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="certificate to write (default: an entry in certificate.json beside the GGUF)",
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=DEFAULT_TIMEOUT_SECONDS,
        metavar="S",
        help="seconds for everything together (default: %(default)g)",
    )
    parser.add_argument(
        "--threads", type=int, default=0, metavar="N", help="0 = llama.cpp's choice"
    )
    return parser


@os_errors_told
def main(argv: list[str] | None = None) -> int:
    """Run the command; exit codes: 0 passed, 1 a check failed, 2 usage, 3 unusable, 6 time."""
    args = build_parser().parse_args(argv)
    if args.timeout <= 0:
        raise CommandError(f"--timeout {args.timeout:g} is not above 0; got no time", USAGE)
    for name, value in QUIET_THREADS.items():
        os.environ.setdefault(name, value)
    certificate = verify_gguf(
        args.gguf,
        args.reference,
        base_dir=args.base,
        timeout_seconds=args.timeout,
        n_threads=args.threads,
    )
    path = write_certificate(certificate, args.gguf, args.output)
    log(format_table(certificate))
    log(f"written: {path}")
    print(json.dumps(certificate, indent=2, ensure_ascii=False))
    return OK if certificate["passed"] else FAILED


if __name__ == "__main__":
    run_command(main)
