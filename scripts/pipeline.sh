#!/usr/bin/env bash
# The whole pipeline: prepare -> train -> evaluate -> export -> verify -> report. Stages that are done and still valid are skipped.
#
#   scripts/pipeline.sh scripts/recipes/smollm2-135m-cpu.yaml
#   scripts/pipeline.sh RECIPE --from export --to verify
#
# QUANTIZATION=F16,Q8_0,Q4_K_M chooses the files, TOMEFORGE_OUTPUTS another folder than outputs/.
set -euo pipefail
cd "$(dirname "$0")/.."

STAGES=(prepare train evaluate export verify report)
QUANTIZATION="${QUANTIZATION:-F16,Q8_0,Q4_K_M}"
usage() {
  printf 'usage: scripts/pipeline.sh RECIPE [--from STAGE] [--to STAGE]\nstages: %s\n' "${STAGES[*]}"
}
fail() { printf 'error: %s\n' "$*" >&2; exit 2; }
stage_number() {
  local i
  for i in "${!STAGES[@]}"; do
    [ "${STAGES[$i]}" != "$1" ] || { echo "$i"; return; }
  done
  fail "unknown stage '$1', expected one of: ${STAGES[*]}"
}

RECIPE="" FROM=0 TO=$((${#STAGES[@]} - 1))
while [ $# -gt 0 ]; do
  case "$1" in
    -h | --help) usage; exit 0 ;;
    --from | --to)
      [ $# -ge 2 ] || fail "$1 needs a stage: ${STAGES[*]}"
      number=$(stage_number "$2") || exit 2
      if [ "$1" = --from ]; then FROM=$number; else TO=$number; fi
      shift 2 ;;
    -*) fail "unknown option '$1', expected --from or --to" ;;
    *) [ -z "$RECIPE" ] || fail "two recipes given: '$RECIPE' and '$1'"; RECIPE=$1; shift ;;
  esac
done
[ -n "$RECIPE" ] || { usage >&2; fail "no recipe given"; }
[ -f "$RECIPE" ] || fail "recipe '$RECIPE' does not exist; see scripts/recipes/"
[ "$FROM" -le "$TO" ] || fail "--from ${STAGES[$FROM]} comes after --to ${STAGES[$TO]}"

PY=.venv/bin/python
[ -x "$PY" ] || PY=python3
OUTPUTS="${TOMEFORGE_OUTPUTS:-outputs}"
# A run's own recipe.yaml names its run; another file gives its name to it.
RUN_NAME=$(sed -n "s/^run_name: *['\"]\{0,1\}\([^'\" #]*\).*/\1/p" "$RECIPE" | head -n 1)
RUN_NAME="${RUN_NAME:-$(basename "${RECIPE%.*}")}"
RUN="$OUTPUTS/$RUN_NAME"

# Lists the files of the last export whose certificate is missing, of another file, or not passed.
NOT_CERTIFIED='
import json, pathlib, sys
folder = pathlib.Path(sys.argv[1])
export = json.loads((folder / "export.json").read_text())
path = folder / "certificate.json"
known = json.loads(path.read_text()).get("files", {}) if path.is_file() else {}
for name in export["current"]:
    entry = known.get(name, {})
    if not entry.get("passed") or entry.get("sha256") != export["files"][name]["sha256"]:
        print(folder / name)
'

# Every file's answers would take minutes: `evaluate_model` without --ask lets the files answer too.
evaluate() {
  "$PY" -m scripts.evaluate_model --config "$RECIPE" --output-root "$OUTPUTS" --ask base,tuned
}

run_stage() {
  case "$1" in
    prepare) "$PY" -m scripts.prepare_data --config "$RECIPE" --output-root "$OUTPUTS" ;;
    train) "$PY" -m scripts.train_lora --config "$RECIPE" --output-root "$OUTPUTS" ;;
    evaluate) evaluate ;;
    export) "$PY" -m export.export_gguf "$RUN/adapter" --output "$RUN/gguf" --quantization "$QUANTIZATION" ;;
    verify)
      local certificate="$RUN/gguf/certificate.json" files=()
      [ -f "$RUN/gguf/export.json" ] || fail "'$RUN/gguf' has no export; begin earlier: --from export"
      mapfile -t files < <("$PY" -c "$NOT_CERTIFIED" "$RUN/gguf")
      if [ ${#files[@]} -eq 0 ]; then
        printf 'verify: every file has its certificate\n' >&2
      else
        "$PY" -m export.verify_gguf "${files[@]}" --reference "$RUN/adapter" >/dev/null
      fi
      echo "$certificate" ;;
    # Measures what the export has added, and writes the report.
    report) evaluate ;;
  esac
}
for number in $(seq "$FROM" "$TO"); do
  started=$SECONDS
  printf '== %s\n' "${STAGES[$number]}" >&2
  run_stage "${STAGES[$number]}"
  printf '== %s: %d s\n' "${STAGES[$number]}" "$((SECONDS - started))" >&2
done
