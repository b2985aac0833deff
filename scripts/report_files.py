"""A run's GGUF files: size against what quantization cost, speed, and the certificates."""

from dataclasses import dataclass
from typing import Any

from scripts.report_blocks import UNKNOWN, Block, Cell, Hint, Picture, Table, Text
from scripts.report_certificate import (
    certificate_block,
    certificate_verdict,
    check_value,
    is_current,
)
from scripts.report_numbers import decimal, interval, percent, significant, size
from scripts.report_run import PYTHON, RunFiles, export_hint


@dataclass(frozen=True)
class ExportedFile:
    """One GGUF: what the export recorded, its valid certificate and what was measured of it."""

    name: str
    export: dict[str, Any]
    certificate: dict[str, Any] | None
    measured: dict[str, Any]
    verdict: Cell

    @property
    def mean_kl(self) -> float | None:
        """Mean KL divergence from the trained model, None where no valid certificate says it."""
        return check_value(self.certificate, "mean_kl") if self.certificate else None

    @property
    def passed(self) -> bool:
        """Whether a certificate of this very file passed."""
        return self.certificate is not None and bool(self.certificate["passed"])


def exported_files(run: RunFiles) -> list[ExportedFile]:
    """Join what is known of each file, largest first; figures of another file are left out."""
    contenders = (run.evaluation or {"contenders": {}})["contenders"].values()
    measured = {one["file"]: one for one in contenders if one.get("file")}
    files = []
    for name, export in run.exported.items():
        certificate = run.certificates.get(name)
        verdict = certificate_verdict(certificate, export)
        if certificate is not None and not is_current(certificate, export):
            certificate = None
        of_this = measured.get(name, {})
        if of_this.get("sha256") not in (None, export["sha256"]):
            of_this = {}
        files.append(ExportedFile(name, export, certificate, of_this, verdict))
    return sorted(files, key=lambda file: (-file.export["bytes"], file.name))


def smallest_passing(files: list[ExportedFile]) -> ExportedFile | None:
    """Find the smallest file whose certificate passed."""
    passing = [file for file in files if file.passed]
    return min(passing, key=lambda file: file.export["bytes"], default=None)


def file_blocks(run: RunFiles) -> list[Block]:
    """Compare the files."""
    files = exported_files(run)
    if not files:
        return [export_hint(run, "The adapter was not exported yet.")]
    columns = [
        "type",
        "certificate",
        "size",
        "mean KL divergence",
        "same top token",
        "perplexity ratio",
        "held-out loss",
        "tokens/s",
        "memory",
    ]
    blocks: list[Block] = [Table(columns, [_file_row(file) for file in files])]
    if any(file.mean_kl is not None for file in files):
        alt = (
            "Size of each file in megabytes against its mean KL divergence from the trained model."
        )
        blocks.append(Picture("quantization", "quantization.svg", alt))
    blocks.append(
        Text(
            "KL divergence, top token and perplexity ratio compare a file with the trained model before "
            "quantization, on held-out text. Held-out loss, tokens/s (decoding) and memory were measured "
            "by running it; memory counts the mapped file.",
            is_small=True,
        )
    )
    if outdated := [file for file in files if file.verdict.text in ("outdated", "not verified")]:
        names = ", ".join(file.export["type"] for file in outdated)
        blocks.append(_verify_hint(run, outdated, f"Without a certificate of their own: {names}."))
    return blocks


def _file_row(file: ExportedFile) -> list[Cell]:
    export, measured = file.export, file.measured
    top = check_value(file.certificate, "same_top_token") if file.certificate else None
    ratio = check_value(file.certificate, "perplexity_ratio") if file.certificate else None
    loss = measured.get("loss") or {}
    return [
        Cell(export["type"], _fallbacks(export)),
        file.verdict,
        Cell(size(export["bytes"]), f"{decimal(export['bits_per_weight'], 2)} bits/weight"),
        Cell(significant(file.mean_kl)),
        Cell(percent(top["share"]) if top else UNKNOWN),
        Cell(decimal(ratio["ratio"], 4) if ratio else UNKNOWN),
        Cell(decimal(loss.get("loss"), 3), interval(loss.get("loss_95"), 3)),
        Cell(decimal(measured.get("tokens_per_second"), 1)),
        Cell(size(measured.get("peak_memory_bytes"))),
    ]


def _fallbacks(export: dict[str, Any]) -> str:
    """Name the types that some matrices took instead."""
    found = [f"{number} × {kind}" for kind, number in (export.get("fallbacks") or {}).items()]
    return f"{', '.join(found)} of {export['matrices']} matrices" if found else ""


def _verify_hint(run: RunFiles, files: list[ExportedFile], text: str) -> Hint:
    paths = " ".join(run.path(f"gguf/{file.name}") for file in files)
    command = f"{PYTHON} -m export.verify_gguf {paths} --reference {run.path('adapter')}"
    return Hint(text, command)


def certificate_blocks(run: RunFiles) -> list[Block]:
    """Show the certificate of each file."""
    files = exported_files(run)
    if not files and not run.certificates:
        return [export_hint(run, "There is no file to verify; export the adapter first.")]
    if not run.certificates:
        return [_verify_hint(run, files, "The files were not compared with the trained model yet.")]
    order = [file.name for file in files]
    names = [name for name in order if name in run.certificates]
    names += sorted(set(run.certificates) - set(order)) if not files else []
    blocks: list[Block] = [
        certificate_block(run.certificates[name], run.exported.get(name)) for name in names
    ]
    return blocks
