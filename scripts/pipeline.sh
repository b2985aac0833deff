#!/usr/bin/env bash
# The whole pipeline: prepare -> train -> evaluate -> export -> verify. Stages that are done and still valid are skipped.
#
#   scripts/pipeline.sh scripts/recipes/smollm2-135m-cpu.yaml
#   scripts/pipeline.sh RECIPE --from export --to verify
#
# QUANTIZATION=F16,Q8_0,Q4_K_M chooses the files, TOMEFORGE_OUTPUTS another folder than outputs/.
set -euo pipefail
cd "$(dirname "$0")/.."

STAGES=(prepare train evaluate export verify)
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

RECIPE="" FROM=0 TO=4
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

run_stage() {
  case "$1" in
    prepare) "$PY" -m scripts.prepare_data --config "$RECIPE" --output-root "$OUTPUTS" ;;
    train) "$PY" -m scripts.train_lora --config "$RECIPE" --output-root "$OUTPUTS" ;;
    evaluate) "$PY" -m scripts.evaluate_model --config "$RECIPE" --output-root "$OUTPUTS" ;;
    export) "$PY" -m export.export_gguf "$RUN/adapter" --output "$RUN/gguf" --quantization "$QUANTIZATION" ;;
    verify)
      local file certificate="$RUN/gguf/certificate.json"
      for file in "$RUN"/gguf/*.gguf; do
        if [ "$certificate" -nt "$file" ] && grep -q "\"$(basename "$file")\"" "$certificate" && ! grep -q '"passed": false' "$certificate"; then
          printf 'verify: %s is up to date\n' "$file" >&2
        else
          "$PY" -m export.verify_gguf "$file" --reference "$RUN/adapter" >/dev/null
        fi
      done
      echo "$certificate" ;;
  esac
}
for number in $(seq "$FROM" "$TO"); do
  started=$SECONDS
  printf '== %s\n' "${STAGES[$number]}" >&2
  run_stage "${STAGES[$number]}"
  printf '== %s: %d s\n' "${STAGES[$number]}" "$((SECONDS - started))" >&2
done
