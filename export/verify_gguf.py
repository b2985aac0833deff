"""Certify GGUF files: do they load, tokenize, render, answer and stop as the model they are of?

In: GGUF files; as reference the merged model folder or the adapter folder; held-out conversations.
Out: a certificate for each. llama.cpp and the reference run in child processes.

Run: python -m export.verify_gguf GGUF [GGUF …] --reference DIR [--rows FILE] [--timeout S]
"""

import argparse
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export._cli import FAILED, MODEL, OK, USAGE, CommandError, log, run_command
from export._files import os_errors_told, sha256_file, working_dir, write_json
from export._process import QUIET_THREADS
from export.gguf_header import GgufHeader, read_gguf_header
from export.verify_checks import (
    Check,
    check_architecture,
    check_chat_prompts,
    check_chat_template,
    check_divergence,
    check_eos,
    check_metadata,
    check_stops,
    check_token_ids,
    check_vocabulary,
)
from export.verify_children import Child
from export.verify_corpus import CONVERSATIONS, STOP_CONVERSATION
from export.verify_divergence import ReferenceLogits
from export.verify_measure import (
    DEFAULT_TIMEOUT_SECONDS,
    MAX_NEW_TOKENS,
    compare,
    evaluate_reference,
    load,
    start_probe,
    start_reference,
)
from export.verify_rows import DEFAULT_MAX_TOKENS, find_rows

_FEWEST_TOKENS = 16


@dataclass(frozen=True)
class _Measured:
    """A reference that was evaluated: its process, what it is, what it says."""

    process: Child
    about: dict[str, Any]
    logits: ReferenceLogits


def verify_gguf(gguf_path: Path, reference_dir: Path, **options: Any) -> dict[str, Any]:
    """Run all checks on one file and give its certificate; options as in `verify_files`.

    Raises:
        CommandError: Exit 1: out of memory or disk. Exit 3: the file or the reference is
            unusable. Exit 6: out of time.
    """
    (certificate,) = verify_files([gguf_path], reference_dir, **options).values()
    return certificate


def verify_files(
    gguf_paths: Sequence[Path],
    reference_dir: Path,
    *,
    base_dir: Path | None = None,
    rows_path: Path | None = None,
    max_tokens: int = DEFAULT_MAX_TOKENS,
    scratch_dir: Path | None = None,
    timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS,
    n_threads: int = 0,
) -> dict[str, dict[str, Any]]:
    """Certify files of one model; the reference is evaluated once.

    Args:
        gguf_paths: Files of different names.
        reference_dir: The merged model, or the adapter the files were made from.
        base_dir: The adapter's 16-bit base, when the one that it names is not to be used.
        rows_path: Conversations to measure on; None for the run's held-out ones, and where there
            are none, the fixed ones.
        max_tokens: Positions to measure, at most.
        scratch_dir: Where there is room for the reference's log-probabilities; by default the
            first file's folder.
        timeout_seconds: For each file, everything together.
        n_threads: Of llama.cpp; 0 = its own choice.

    Returns:
        Certificates by file name. One of several files that is unusable gets one that says so.

    Raises:
        CommandError: Exit 1: out of memory or disk. Exit 3: the only file, or the reference, is
            unusable. Exit 6: out of time.
    """
    started = time.monotonic()
    deadline = started + timeout_seconds * len(gguf_paths)
    headers: dict[Path, GgufHeader | CommandError] = {}
    for path in gguf_paths:
        try:
            headers[path] = read_gguf_header(path)
        except CommandError as error:
            if len(gguf_paths) == 1:
                raise
            headers[path] = error
    rows_path = rows_path or find_rows(reference_dir, gguf_paths[0])
    scratch = scratch_dir or gguf_paths[0].parent
    certificates = {}
    with working_dir(scratch, "verify") as folder, start_reference(reference_dir) as process:
        about, logits = evaluate_reference(
            process,
            folder,
            reference_dir,
            base_dir=base_dir,
            rows_path=rows_path,
            max_tokens=max_tokens,
            deadline=deadline,
        )
        reference = _Measured(process, about, logits)
        shared_seconds = time.monotonic() - started
        for path, header in headers.items():
            began = time.monotonic() - shared_seconds
            try:
                if isinstance(header, CommandError):
                    raise header
                certificate = _certify(path, header, reference, n_threads, deadline)
            except CommandError as error:
                if len(gguf_paths) == 1 or error.exit_code != MODEL:
                    raise
                certificate = _refuse(path, str(error), reference)
            certificate["seconds"] = round(time.monotonic() - began, 1)
            certificates[path.name] = certificate
    return certificates


def _certify(
    gguf_path: Path, header: GgufHeader, reference: _Measured, n_threads: int, deadline: float
) -> dict[str, Any]:
    about = reference.about
    with start_probe(gguf_path) as probe:
        loaded = load(probe, gguf_path, reference.logits, n_threads, deadline)
        texts = about["texts"]
        request = {"do": "tokenize", "texts": texts, "conversations": CONVERSATIONS}
        found = probe.ask(request, deadline)
        summary = compare(probe, reference.logits, deadline)
        request = {
            "do": "generate",
            "messages": STOP_CONVERSATION,
            "max_new_tokens": MAX_NEW_TOKENS,
        }
        answer = probe.ask(request, deadline)
    reference_end = _find_end(reference, answer, loaded["end_ids"], deadline)
    checks = [
        Check("loads", True, f"llama_cpp {loaded['version']}", "no error"),
        check_architecture(header, about["config"]),
        check_vocabulary(loaded["n_vocab"], about["config"]),
        check_metadata(header),
        check_eos(loaded, about["eos_id"], loaded["end_ids"]),
        check_chat_template(header, about["template"]),
        check_token_ids(texts, found["text_ids"], about["text_ids"]),
        *check_chat_prompts(found["chat_ids"], about["chat_ids"], about["bos_id"]),
        *check_divergence(header, summary),
        check_stops(answer, about["answer_end"], loaded["end_ids"], reference_end, MAX_NEW_TOKENS),
    ]
    rows = reference.logits.rows
    return {
        "file": gguf_path.name,
        "bytes": header.file_bytes,
        "sha256": sha256_file(gguf_path),
        "type": header.type_name,
        "bits_per_weight": round(header.bits_per_weight, 3),
        "fallbacks": dict(header.fallbacks),
        "reference": about["identity"],
        "rows": {
            "source": reference.logits.source,
            "conversations": len(rows),
            "tokens": summary.positions,
        },
        "passed": all(check.passed for check in checks),
        "checks": [check.as_dict() for check in checks],
    }


def _find_end(
    reference: _Measured, answer: dict[str, Any], end_ids: list[int], deadline: float
) -> int | None:
    """Ask the reference about an answer that did not end; see `check_stops`."""
    vocab_size = reference.logits.vocab_size
    if answer["stopped"] or not answer["tokens"] or max(answer["ids"]) >= vocab_size:
        return None
    request = {
        "do": "find_end",
        "ids": answer["ids"],
        "start": answer["start"],
        "end_ids": [token for token in end_ids if token < vocab_size],
    }
    place = reference.process.ask(request, deadline)
    return None if place is None else int(place) - int(answer["start"])


def _refuse(gguf_path: Path, message: str, reference: _Measured) -> dict[str, Any]:
    """Give the certificate of a file that cannot be used; it names no folder of this machine."""
    for folder in (gguf_path.resolve().parent, gguf_path.parent):
        message = message.replace(f"{folder}/", "")
    check = Check("loads", False, message, "no error")
    return {
        "file": gguf_path.name,
        "bytes": gguf_path.stat().st_size if gguf_path.is_file() else 0,
        "sha256": sha256_file(gguf_path) if gguf_path.is_file() else None,
        "type": "UNKNOWN",
        "bits_per_weight": 0.0,
        "fallbacks": {},
        "reference": reference.about["identity"],
        "passed": False,
        "checks": [check.as_dict()],
    }


def write_certificates(
    certificates: dict[str, dict[str, Any]], gguf_paths: Sequence[Path], output: Path | None
) -> list[Path]:
    """Write certificates: to `output`, else into the `certificate.json` beside each file.

    `output` holds the certificate itself if there is one, and `{"files": {…}}` if there are more.
    """
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_json(output, _result(certificates))
        return [output]
    written = {path.parent / "certificate.json": path.parent for path in gguf_paths}
    for path, folder in written.items():
        try:
            files = dict(json.loads(path.read_text(encoding="utf-8"))["files"])
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            files = {}
        new = {gguf.name: certificates[gguf.name] for gguf in gguf_paths if gguf.parent == folder}
        write_json(path, {"files": {**files, **new}})
    return list(written)


def _result(certificates: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {"files": certificates} if len(certificates) > 1 else next(iter(certificates.values()))


def format_table(certificate: dict[str, Any]) -> str:
    """Give the certificate as a table for people."""
    lines = [
        f"{certificate['file']}: {certificate['type']}, {certificate['bytes'] / 1e6:.1f} MB, "
        f"{certificate['bits_per_weight']:.2f} bits per weight"
    ]
    for check in certificate["checks"]:
        state = "ok" if check["passed"] else "FAILED"
        state = "note" if check["passed"] and check["threshold"] is None else state
        limit = check["threshold"]
        limit = "" if limit is None else f"   (limit: {_plain(limit)})"
        lines.append(f"  {state:<6} {check['name']:<16} {_plain(check['value'])}{limit}")
    if rows := certificate.get("rows"):
        lines.append(
            f"  measured on {rows['tokens']} tokens of {rows['conversations']} conversations "
            f"({rows['source']}), {_describe(certificate['reference'])}"
        )
    lines.append(f"{'passed' if certificate['passed'] else 'FAILED'} in {certificate['seconds']} s")
    return "\n".join(lines)


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        shown = {key: item for key, item in value.items() if key != "text" and item is not None}
        return ", ".join(f"{key} {item}" for key, item in shown.items())
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return f"missing: {', '.join(value)}" if value else "complete"
    return str(value)


def _describe(identity: dict[str, str]) -> str:
    known_by = identity.get("sha256") or identity["fingerprint"]
    return f"reference: {identity['kind']} {identity['name']} ({known_by[:12]})"


def build_parser() -> argparse.ArgumentParser:
    """Build the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m export.verify_gguf",
        description="Compare GGUF files with the model they were made from: tokens, chat prompts, "
        "next-token distributions, end of answers. Prints a certificate (JSON); of several files, "
        'an object {"files": {NAME: certificate}}.',
    )
    parser.add_argument("gguf", type=Path, nargs="+", help="GGUF files of one model")
    parser.add_argument(
        "--reference", type=Path, required=True, metavar="DIR", help="merged model, or adapter"
    )
    parser.add_argument(
        "--base", type=Path, metavar="DIR", help="the adapter's base (default: the one it names)"
    )
    parser.add_argument(
        "--rows",
        type=Path,
        metavar="FILE",
        help='conversations to measure on, lines {"messages": […]} (default: the run\'s '
        "data/eval.jsonl, else six fixed ones)",
    )
    parser.add_argument(
        "--max-tokens",
        type=int,
        default=DEFAULT_MAX_TOKENS,
        metavar="N",
        help="positions to measure, at most (default: %(default)d)",
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
        help="seconds for each file, everything together (default: %(default)g)",
    )
    parser.add_argument(
        "--threads", type=int, default=0, metavar="N", help="0 = llama.cpp's choice"
    )
    return parser


@os_errors_told
def main(argv: list[str] | None = None) -> int:
    """Run the command; exit codes: 0 passed, 1 a check failed, 2 usage, 3 unusable, 6 time."""
    args = build_parser().parse_args(argv)
    _check_arguments(args)
    for name, value in QUIET_THREADS.items():
        os.environ.setdefault(name, value)
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
    certificates = verify_files(
        args.gguf,
        args.reference,
        base_dir=args.base,
        rows_path=args.rows,
        max_tokens=args.max_tokens,
        scratch_dir=args.output.parent if args.output else None,
        timeout_seconds=args.timeout,
        n_threads=args.threads,
    )
    paths = write_certificates(certificates, args.gguf, args.output)
    for certificate in certificates.values():
        log(format_table(certificate))
    log(f"written: {', '.join(map(str, paths))}")
    print(json.dumps(_result(certificates), indent=2, ensure_ascii=False))
    return OK if all(certificate["passed"] for certificate in certificates.values()) else FAILED


def _check_arguments(args: argparse.Namespace) -> None:
    if args.timeout <= 0:
        raise CommandError(f"--timeout {args.timeout:g} is not above 0; got no time", USAGE)
    if args.max_tokens < _FEWEST_TOKENS:
        raise CommandError(
            f"--max-tokens {args.max_tokens} is too few to measure; expected {_FEWEST_TOKENS} or "
            f"more (default: {DEFAULT_MAX_TOKENS})",
            USAGE,
        )
    names = [path.name for path in args.gguf]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise CommandError(
            f"two files are called '{twice}', and certificates go by name; verify them one by one",
            USAGE,
        )


if __name__ == "__main__":
    run_command(main)
