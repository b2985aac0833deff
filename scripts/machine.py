"""What this machine really has: device, memory and threads inside their cgroup, free disk.

The numbers are read, never assumed: a container's limits count, and each folder is looked up on the
disk that it lies on.
"""

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CGROUP_ROOT = Path("/sys/fs/cgroup")
PROC_CGROUP = Path("/proc/self/cgroup")
CPU_INFO = Path("/proc/cpuinfo")
BF16_CAPABILITY = (8, 0)
_BF16_FLAGS = {"amx_bf16", "avx512_bf16", "bf16"}
# cgroup v1 says "no limit" with a number near 2^63.
_NO_LIMIT = 1 << 60


@dataclass(frozen=True)
class Disk:
    """Free space where a folder is, or will be.

    Attributes:
        path: The nearest folder that exists.
        free_bytes: What a user without special rights can write.
        filesystem: Number of the file system; folders with the same one share the space.
    """

    path: Path
    free_bytes: int
    filesystem: int


@dataclass(frozen=True)
class Machine:
    """Hardware as this process may use it; ``capability`` is None without a CUDA device."""

    device: str
    device_name: str
    ram_total_bytes: int
    ram_available_bytes: int
    cpu_threads: int
    capability: tuple[int, int] | None = None
    gpu_total_bytes: int = 0
    gpu_free_bytes: int = 0
    cpu_bf16: bool = False
    colab: bool = False
    disks: Mapping[str, Disk] = field(default_factory=dict)

    @property
    def training_bytes(self) -> int:
        """Memory that training may take: the accelerator's, or the RAM without one."""
        return self.gpu_free_bytes if self.device == "cuda" else self.ram_available_bytes

    def to_json(self) -> dict[str, Any]:
        """Give the numbers under names that carry their unit."""
        values = {key: value for key, value in vars(self).items() if key != "disks"}
        values["disks"] = {
            name: {"path": str(disk.path), "free_bytes": disk.free_bytes}
            for name, disk in self.disks.items()
        }
        return values


@dataclass(frozen=True)
class Precision:
    """A number format for training, the trainer arguments that set it, and why it was chosen."""

    name: str
    training_arguments: dict[str, bool]
    reason: str


def choose_precision(capability: tuple[int, int] | None, cpu_bf16: bool) -> Precision:
    """Choose bf16, fp16 or fp32 from the hardware.

    torch's own answer is not asked: it is True on a T4, where bf16 is emulated (pytorch#148322).

    Args:
        capability: CUDA compute capability, None on a CPU.
        cpu_bf16: Whether the CPU has bf16 instructions.
    """
    if capability is None:
        if cpu_bf16:
            return _precision("bf16", "this CPU has bf16 instructions")
        return _precision("fp32", "this CPU has no bf16 instructions: bf16 would be emulated")
    have, wanted = ".".join(map(str, capability)), ".".join(map(str, BF16_CAPABILITY))
    if capability >= BF16_CAPABILITY:
        return _precision("bf16", f"compute capability {have} >= {wanted}")
    return _precision("fp16", f"compute capability {have} < {wanted}: bf16 would be emulated")


def _precision(name: str, reason: str) -> Precision:
    return Precision(name, {"bf16": name == "bf16", "fp16": name == "fp16"}, reason)


def inspect_machine(paths: Mapping[str, Path], cpu_bf16: bool | None = None) -> Machine:
    """Look at the hardware; call it before a model is loaded, or its memory counts as taken.

    Args:
        paths: Folders that will be written to, by purpose: ``run``, ``checkpoints``, ``downloads``.
        cpu_bf16: Whether the CPU has bf16 instructions; by default its flags are read.
    """
    import psutil
    import torch

    memory = psutil.virtual_memory()
    total, available = memory.total, memory.available
    limit, used = cgroup_memory()
    if limit is not None:
        total, available = min(total, limit), min(available, max(0, limit - used))
    gpu: dict[str, Any] = {"device": "cpu", "device_name": cpu_name()}
    if torch.cuda.is_available():
        free, whole = torch.cuda.mem_get_info()
        gpu = {
            "device": "cuda",
            "device_name": torch.cuda.get_device_name(),
            "capability": tuple(torch.cuda.get_device_capability()),
            "gpu_total_bytes": whole,
            "gpu_free_bytes": free,
        }
    return Machine(
        **gpu,
        ram_total_bytes=total,
        ram_available_bytes=available,
        cpu_threads=usable_threads(),
        cpu_bf16=has_cpu_bf16() if cpu_bf16 is None else cpu_bf16,
        colab="COLAB_RELEASE_TAG" in os.environ,
        disks={name: inspect_disk(path) for name, path in paths.items()},
    )


def inspect_disk(path: Path) -> Disk:
    """Look up the disk of a folder that need not exist yet: its nearest parent decides."""
    folder = path.expanduser().absolute()
    while not folder.exists():
        folder = folder.parent
    return Disk(folder, shutil.disk_usage(folder).free, folder.stat().st_dev)


def hub_cache_dir() -> Path:
    """Give the folder that models from the hub are downloaded to."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)


def is_cached(hub_name: str, cache_dir: Path) -> bool:
    """Tell whether weights of a hub model have been downloaded; partly counts as no."""
    snapshots = cache_dir / f"models--{hub_name.replace('/', '--')}" / "snapshots"
    return any(path.stat().st_size > 0 for path in snapshots.glob("*/*.safetensors"))


def has_cpu_bf16(cpu_info: Path = CPU_INFO) -> bool:
    """Tell whether the CPU computes in bf16; ``UNSLOTH_CPU_BF16`` overrides, as in Unsloth."""
    override = os.environ.get("UNSLOTH_CPU_BF16", "").strip().lower()
    if override:
        return override in {"1", "true", "yes", "on"}
    for line in _lines(cpu_info):
        key, _, value = line.partition(":")
        if key.strip().lower() in {"flags", "features"}:
            return bool(set(value.lower().split()) & _BF16_FLAGS)
    return False


def cpu_name(cpu_info: Path = CPU_INFO) -> str:
    """Name the CPU as its maker does."""
    for line in _lines(cpu_info):
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return "CPU"


def usable_threads(root: Path = CGROUP_ROOT, proc: Path = PROC_CGROUP) -> int:
    """Give the threads worth starting: affinity, cut to the cgroup's quota."""
    try:
        threads = len(os.sched_getaffinity(0))
    except AttributeError:  # not on every system
        threads = os.cpu_count() or 1
    for folder in _own_groups(root, proc, "cpu"):
        words = _words(folder / "cpu.max")  # v2: "200000 100000", or "max 100000"
        words = words or _words(folder / "cpu.cfs_quota_us") + _words(folder / "cpu.cfs_period_us")
        quota = [int(word) for word in words if word.isdigit()]
        if len(quota) == 2 and quota[1]:
            threads = min(threads, max(1, quota[0] // quota[1]))
    return threads


def cgroup_memory(root: Path = CGROUP_ROOT, proc: Path = PROC_CGROUP) -> tuple[int | None, int]:
    """Give the tightest memory limit of our cgroups and what is used of it, in bytes.

    File pages that can be dropped are not counted as used.

    Returns:
        ``(None, 0)`` without a limit.
    """
    found: list[tuple[int, int]] = []
    for folder in _own_groups(root, proc, "memory"):
        limit = _number(folder / "memory.max", folder / "memory.limit_in_bytes")
        used = _number(folder / "memory.current", folder / "memory.usage_in_bytes") or 0
        if limit is None or limit > _NO_LIMIT:
            continue
        statistics = dict(line.split()[:2] for line in _lines(folder / "memory.stat") if line)
        droppable = statistics.get("total_inactive_file", statistics.get("inactive_file", "0"))
        found.append((limit, max(0, used - int(droppable))))
    return min(found, key=lambda pair: pair[0] - pair[1], default=(None, 0))


def _own_groups(root: Path, proc: Path, controller: str) -> list[Path]:
    """List the folders of our cgroup and its parents, v2 and v1: a parent's limit binds as well.

    Inside a container the path may be the host's and not exist; then the root is our group.
    """
    folders = [root, root / controller]
    for line in _lines(proc):
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers == "" or controller in controllers.split(","):
            top = root / controller if controllers else root
            parts = Path(path.lstrip("/")).parts
            folders += [top.joinpath(*parts[:depth]) for depth in range(1, len(parts) + 1)]
    return [folder for folder in folders if folder.is_dir()]


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # no such cgroup version, or no such system
        return []


def _words(path: Path) -> list[str]:
    return " ".join(_lines(path)).split()


def _number(*paths: Path) -> int | None:
    words = [word for path in paths for word in _words(path)[:1]]
    return int(words[0]) if words and words[0].isdigit() else None
