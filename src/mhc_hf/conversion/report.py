"""What a conversion did, in the few lines that its user wants to read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ConversionReport:
    """Outcome of `convert_checkpoint`; `str()` of it is the report that the command line prints.

    Attributes:
        output_dir: the converted folder.
        family: model type of the base.
        hc_mult: n, the number of residual streams.
        start: name of the starting point.
        parameters_before: elements of the base's tensors, as they are stored.
        parameters_added: elements of the mHC tensors.
        bytes_cloned: of base shards shared copy-on-write.
        bytes_linked: of base shards that are hard links.
        bytes_copied: of base shards copied as they are.
        bytes_written: of everything that was written anew; a `phi` of zeros counts in full, and takes no room.
        has_tokenizer: whether the base had a tokenizer to bring along.
        self_contained: whether modelling code is beside the weights.
        seconds: wall time, downloads included.
    """

    output_dir: Path
    family: str
    hc_mult: int
    start: str
    parameters_before: int
    parameters_added: int
    bytes_cloned: int
    bytes_linked: int
    bytes_copied: int
    bytes_written: int
    has_tokenizer: bool
    self_contained: bool
    seconds: float

    def __str__(self) -> str:
        share = 100 * self.parameters_added / self.parameters_before
        moved = [("cloned", self.bytes_cloned), ("linked", self.bytes_linked), ("copied", self.bytes_copied)]
        how = [f"{format_bytes(count)} {name}" for name, count in moved if count]
        lines = [
            f"{self.family} widened into {self.hc_mult} residual streams ({self.start} start): {self.output_dir}",
            f"  parameters  {self.parameters_before:,} before, {self.parameters_added:,} added ({share:.3g} %)",
            f"  weights     {', '.join([*how, f'{format_bytes(self.bytes_written)} written'])}",
            *([] if self.has_tokenizer else ["  tokenizer   the base has none"]),
            f"  time        {self.seconds:.1f} s",
            "load it with",
            "  import mhc_hf; from transformers import AutoModelForCausalLM",
            f"  model = AutoModelForCausalLM.from_pretrained({str(self.output_dir)!r})",
        ]
        if self.self_contained:
            lines.append("or, without mhc_hf, with trust_remote_code=True")
        return "\n".join(lines)


def format_bytes(count: int) -> str:
    """1234567 -> "1.2 MB"."""
    units = ("bytes", "kB", "MB", "GB", "TB")
    power = min(len(units) - 1, max(0, len(str(count)) - 1) // 3)
    return f"{count / 1000**power:.{1 if power else 0}f} {units[power]}"
