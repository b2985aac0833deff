#!/usr/bin/env bash
# Summarize a folder of notes (*.md, *.txt) in one process: a JSON object a note, its id the file's name.
#
#   scripts/examples/summarize_notes.sh ~/notes > summaries.jsonl
#
# MODEL: the GGUF (default: the demo's). MAX_TOKENS: the longest summary (default 80). PYTHON: the interpreter.
# Exit codes are those of integration.ask: 1 when a note has no summary; its object says why under "error".
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
model=${MODEL:-$root/outputs/smollm2-135m-cpu/gguf/SmolLM2-135M-Instruct-cpu-v1.0-Q8_0.gguf}
die() { printf 'error: %s\n' "$2" >&2; exit "$1"; }
# PYTHONSAFEPATH: a folder "tools" where you stand is not ours.
run_python() { PYTHONUTF8=1 PYTHONSAFEPATH=1 PYTHONPATH=$root "$python" "$@"; }

usage="usage: ${0##*/} DIR > summaries.jsonl"
[ "${1:-}" != -h ] || { echo "$usage"; exit 0; }
[ $# = 1 ] || die 2 "got $# arguments, expected one; $usage"
[ -d "$1" ] || die 2 "'$1' is no folder; expected one that holds notes"
command -v "$python" >/dev/null || die 1 "no Python at '$python'; run scripts/setup.sh, or set PYTHON"
[ -f "$model" ] || die 3 "no model at '$model'; make demo builds one, or set MODEL to a .gguf file"

# Read all notes first: a folder without any shall not cost the loading of a model.
requests=$(run_python -c 'import json, os, pathlib, sys
for path in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    if path.suffix.lower() in {".md", ".txt"} and path.is_file():
        name = os.fsencode(path.name).decode("utf-8", "replace")
        try:
            text = path.read_text(encoding="utf-8", errors="replace").strip()
        except OSError as error:
            sys.exit(f"error: a note cannot be read: {error}")
        prompt = f"Summarize this note in one sentence:\n\n{text}" if text else ""
        print(json.dumps({"id": name, "prompt": prompt}))' "$1")
[ -n "$requests" ] || die 2 "'$1' holds no *.md or *.txt; expected some notes"
run_python -m integration.ask --model "$model" --jsonl --temperature 0 --max-tokens "${MAX_TOKENS:-80}" <<<"$requests"
