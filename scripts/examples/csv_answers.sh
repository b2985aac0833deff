#!/usr/bin/env bash
# Answer the questions of a CSV: its rows come back with the columns answer, tool_calls (JSON) and error behind them.
#
#   scripts/examples/csv_answers.sh questions.csv > answers.csv
#
# MODEL: the GGUF (default: the demo's). MAX_TOKENS: the longest answer (default 200). PYTHON: the interpreter.
# Exit codes are those of integration.ask: 1 when a question has no answer; its row says why.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
model=${MODEL:-$root/outputs/smollm2-135m-cpu/gguf/SmolLM2-135M-Instruct-cpu-v1.0-Q8_0.gguf}
die() { printf 'error: %s\n' "$2" >&2; exit "$1"; }
# PYTHONSAFEPATH: a folder "tools" where you stand is not ours.
run_python() { PYTHONUTF8=1 PYTHONSAFEPATH=1 PYTHONPATH=$root "$python" "$@"; }

usage="usage: ${0##*/} QUESTIONS.csv > answers.csv (with a column named question)"
[ "${1:-}" != -h ] || { echo "$usage"; exit 0; }
[ $# = 1 ] || die 2 "got $# arguments, expected one; $usage"
[ -f "$1" ] || die 2 "'$1' is no file; expected a CSV"
command -v "$python" >/dev/null || die 1 "no Python at '$python'; run scripts/setup.sh, or set PYTHON"
[ -f "$model" ] || die 3 "no model at '$model'; make demo builds one, or set MODEL to a .gguf file"

requests=$(run_python -c 'import csv, json, sys
try:
    with open(sys.argv[1], encoding="utf-8-sig", newline="") as file:
        header, *rows = [row for row in csv.reader(file, strict=True) if row] or [[]]
    column = header.index("question")
    if any(len(row) != len(header) for row in rows):
        raise ValueError("its rows differ in length")
except (csv.Error, ValueError) as error:
    sys.exit(f"error: {sys.argv[1]!r}: expected a CSV in UTF-8 with a column named question: {error}")
for row in rows:  # the whole row is the id of its request
    print(json.dumps({"id": row, "prompt": row[column]}))' "$1") || exit 2
run_python -m integration.ask --model "$model" --jsonl --tools --max-tokens "${MAX_TOKENS:-200}" <<<"$requests" |
  run_python -c 'import csv, json, sys
table = csv.writer(sys.stdout, lineterminator="\n")
header = next(filter(None, csv.reader(open(sys.argv[1], encoding="utf-8-sig", newline=""))))
table.writerow([*header, "answer", "tool_calls", "error"])
for one in map(json.loads, sys.stdin):
    table.writerow([*one["id"], one["text"], json.dumps(one["tool_calls"], ensure_ascii=False), one["error"]])' "$1"
