#!/usr/bin/env bash
# Three adapters over the embedded base, and a router that chooses between them; what is done is skipped.
#
#   scripts/adapters.sh              # json coding support
#   scripts/adapters.sh coding       # only this one (base, embedding model and router are made as well)
set -euo pipefail
cd "$(dirname "$0")/.."

OUTPUTS="${TOMEFORGE_OUTPUTS:-outputs}"
PY=.venv/bin/python
[ -x "$PY" ] || PY=python3
[ $# -gt 0 ] || set -- json coding support
for name in "$@"; do
  [ -f "scripts/recipes/smollm2-135m-$name-cpu.yaml" ] || {
    printf "error: no recipe for an adapter '%s', expected json, coding or support\n" "$name" >&2
    exit 2
  }
done

# newer A B: A is there, and not older than B
newer() { [ -f "$1" ] && [ ! "$2" -nt "$1" ]; }

for name in "$@"; do
  run="$OUTPUTS/smollm2-135m-$name-cpu"
  lora="$run/gguf/SmolLM2-135M-Instruct-$name-cpu-v1.0-F16-LoRA.gguf"
  printf '== adapter %s\n' "$name" >&2
  scripts/pipeline.sh "scripts/recipes/smollm2-135m-$name-cpu.yaml" --to train >/dev/null
  if ! newer "$lora" "$run/adapter/adapter_model.safetensors"; then
    mkdir -p "$run/gguf"
    "$PY" -m export.export_lora_gguf "$run/adapter" --output "$lora" --overwrite >/dev/null
  fi
  echo "$lora"
done

printf '== base\n' >&2
"$PY" -m export.export_base "$("$PY" -m scripts.default_model)" --output "$OUTPUTS/smollm2-135m-base/gguf" --quantization Q8_0
printf '== router\n' >&2
"$PY" -m export.export_embedding --output "$OUTPUTS/models/all-MiniLM-L6-v2-F16.gguf" >/dev/null
"$PY" -m integration.router train --encoder "$OUTPUTS/models/all-MiniLM-L6-v2-F16.gguf" --output "$OUTPUTS/router/router.npz"
