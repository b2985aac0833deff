#!/usr/bin/env bash
# Check commit messages and wrap their bodies to 72 columns, with the tools that a model can call (none is needed).
#
#   git log -z --format=%B origin/main..HEAD | scripts/examples/format_commit_messages.sh
#   scripts/examples/format_commit_messages.sh .git/COMMIT_EDITMSG
#
# Messages are the files, or standard input with a NUL between two. Valid ones are printed, a NUL between two. Exit 5
# when one is invalid: empty, brackets unbalanced, a placeholder such as TODO, a subject of more than 72 columns.
# PYTHON: the interpreter. (PYTHONSAFEPATH: a folder "tools" where you stand is not ours.)
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
die() { printf 'error: %s\n' "$2" >&2; exit "$1"; }

[ "${1:-}" != -h ] || { echo "usage: ${0##*/} [FILE...] (without files: standard input)"; exit 0; }
for file; do [ -f "$file" ] || die 2 "'$file' is no file; expected a commit message"; done
command -v "$python" >/dev/null || die 1 "no Python at '$python'; run scripts/setup.sh, or set PYTHON"

PYTHONUTF8=1 PYTHONSAFEPATH=1 PYTHONPATH=$root exec "$python" -c 'import pathlib, re, sys
from tools.content_validator import check_content
from tools.text_formatter import count_columns, format_text

messages = [pathlib.Path(name).read_bytes() for name in sys.argv[1:]]
if not messages and (stdin := sys.stdin.buffer.read()):  # nothing at all: git log had no commit
    messages = stdin.removesuffix(b"\0").split(b"\0")
valid = []
for number, data in enumerate(messages, 1):
    subject, _, body = data.decode("utf-8", "replace").strip().partition("\n")
    checks = check_content(f"{subject}\n{body}", ["not_empty", "balanced_brackets", "no_placeholders"])
    reasons = [f"{check.rule} ({check.reason})" for check in checks if not check.passed]
    if (columns := count_columns(subject)) > 72:
        reasons.append(f"subject ({columns} columns, at most 72 are allowed)")
    *text, last = body.strip().split("\n\n")  # trailers keep their lines
    last = last if re.fullmatch(r"(?:[A-Za-z][\w-]*: .*\n?)+", last) else format_text(last, 72)
    if reasons:
        print(f"error: message {number} {subject[:40]!r}:", "; ".join(reasons), file=sys.stderr)
    else:
        valid.append("\n\n".join(filter(None, [subject, format_text("\n\n".join(text), 72), last])) + "\n")
sys.stdout.write("\0".join(valid))
sys.exit(5 if len(valid) < len(messages) else 0)' "$@"
