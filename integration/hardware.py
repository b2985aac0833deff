"""How many threads and how much memory this process really has (affinity and cgroup included)."""

import os
from pathlib import Path

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
