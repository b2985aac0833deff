"""How many threads, memory and context this process really has (affinity and cgroup included)."""

import os
from pathlib import Path

from integration._cli import CONTEXT, CommandError
from integration.gguf_header import GgufHeader

_MAX_DEFAULT_CONTEXT = 8192
_MEMORY_SHARE = 0.5
_CGROUP = Path("/sys/fs/cgroup")


def _read_words(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii").split()
    except OSError:  # no such cgroup version here
        return []


def cpu_quota(cgroup: Path = _CGROUP) -> float | None:
    """Give the CPUs that the cgroup allows (v2, then v1), or None without a limit."""
    words = _read_words(cgroup / "cpu.max")
    if not words:
        words = _read_words(cgroup / "cpu/cpu.cfs_quota_us") + _read_words(
            cgroup / "cpu/cpu.cfs_period_us"
        )
    if len(words) != 2 or words[0] in {"max", "-1"}:
        return None
    return int(words[0]) / int(words[1])


def usable_threads(cgroup: Path = _CGROUP) -> int:
    """Give the threads worth starting: affinity, cut to the cgroup's quota.

    llama.cpp and Ollama count the host's cores; under a quota that costs up to 45 times
    (ollama/ollama#17916).
    """
    affine = hasattr(os, "sched_getaffinity")  # Linux only
    available = len(os.sched_getaffinity(0)) if affine else os.cpu_count() or 1
    quota = cpu_quota(cgroup)
    return max(1, available if quota is None else min(available, round(quota)))


def available_memory_bytes() -> int:
    """Give the memory that can be taken without swapping: the host's, cut to the cgroup's."""
    import psutil

    free = int(psutil.virtual_memory().available)
    limit, used = _read_words(_CGROUP / "memory.max"), _read_words(_CGROUP / "memory.current")
    if limit and used and limit[0] != "max":
        free = min(free, int(limit[0]) - int(used[0]))
    return max(0, free)


def context_size(header: GgufHeader, wanted: int | None, n_sequences: int = 1) -> int:
    """Give the context in tokens: the file's own, capped by memory and 8192 unless asked for.

    A token's keys and values take 2 x layers x KV heads x head size x 2 bytes, in each sequence; of
    several sequences each gets at most 4096 tokens unless asked for.

    Raises:
        CommandError: Exit 4; the context that is wanted does not fit into half of the free memory.
    """
    trained = header.number("context_length", 2048)
    layers, heads = header.number("block_count", 32), header.number("attention.head_count", 32)
    kv_heads = header.number("attention.head_count_kv", heads)
    head_size = header.number(
        "attention.key_length", header.number("embedding_length", 4096) // heads
    )
    token_bytes = 2 * layers * kv_heads * head_size * 2
    token_bytes *= n_sequences
    fits = int(available_memory_bytes() * _MEMORY_SHARE) // max(1, token_bytes)
    if wanted is not None:
        if wanted > fits:
            raise CommandError(
                f"a context of {wanted} tokens needs {wanted * token_bytes >> 20} MiB, more than half "
                f"of the free memory; ask for at most {fits}",
                CONTEXT,
            )
        return wanted
    most = _MAX_DEFAULT_CONTEXT if n_sequences == 1 else _MAX_DEFAULT_CONTEXT // 2
    return max(256, min(trained, most, fits))
