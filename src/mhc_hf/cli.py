"""`mhc-hf`: the command line. One function a command; what a command needs is imported when it runs.

A user's mistake ends with one line and exit code 2; a conversion that does not verify, with exit code 1.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_REASONS = {"native": "there is a C compiler to make it", "triton": "the kernels can run here"}
_PACKAGES = ("mhc-hf", "torch", "transformers", "safetensors", "huggingface_hub", "triton", "accelerate", "peft")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    arguments = build_parser().parse_args(argv)
    run: Callable[[argparse.Namespace], int] = arguments.run
    try:
        return run(arguments)
    except (ValueError, OSError) as error:
        from .conversion import ConversionError
        from .inspection import InspectionError

        # any other ValueError is a defect of ours, and its traceback is wanted
        if not isinstance(error, ConversionError | InspectionError | OSError):
            raise
        print(f"mhc-hf {arguments.command}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"mhc-hf {arguments.command}: stopped", file=sys.stderr)
        return 130


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mhc-hf", description="Manifold-Constrained Hyper-Connections for Hugging Face transformers."
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for add in (add_convert, add_verify, add_inspect, add_doctor):
        add(commands)
    return parser


def add_convert(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("convert", help="widen a pretrained decoder without changing its function")
    parser.set_defaults(run=convert)
    parser.add_argument("source", metavar="SOURCE", help="folder of a transformers checkpoint, or a Hub id")
    parser.add_argument("output_dir", metavar="OUT", help="folder to be made")
    parser.add_argument("--hc-mult", type=int, default=4, metavar="N", help="residual streams, >= 2 (default 4)")
    parser.add_argument("--start", metavar="NAME", help="orthogonal (default for N >= 3) or copies (default for N = 2)")
    parser.add_argument(
        "--dtype", metavar="NAME", help="cast the base's weights: float32, bfloat16, float16 (default: keep every bit)"
    )
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit of a Hub id")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace an earlier conversion in which nothing has changed since"
    )
    parser.add_argument("--copy", action="store_true", help="copy the base's weights even where they could be shared")
    parser.add_argument(
        "--self-contained", action="store_true", help="add the code with which trust_remote_code=True loads the folder"
    )


def convert(arguments: argparse.Namespace) -> int:
    from .conversion import convert_checkpoint

    report = convert_checkpoint(
        arguments.source,
        arguments.output_dir,
        hc_mult=arguments.hc_mult,
        start=arguments.start,
        dtype=arguments.dtype,
        revision=arguments.revision,
        overwrite=arguments.overwrite,
        copy=arguments.copy,
        self_contained=arguments.self_contained,
    )
    print(report)
    return 0


def add_verify(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("verify", help="compare a conversion with its base")
    parser.set_defaults(run=verify)
    parser.add_argument("source", metavar="BASE", help="the base: a folder or a Hub id")
    parser.add_argument("converted", metavar="CONVERTED", help="what `mhc-hf convert` made of it")
    parser.add_argument("--text", type=Path, metavar="FILE", help="text to run (default: Python's language reference)")
    parser.add_argument(
        "--dtype", default="float32", metavar="NAME", help="float32 (default), bfloat16 or float16 to run in"
    )


def verify(arguments: argparse.Namespace) -> int:
    from .conversion import verify_conversion

    text = arguments.text.read_text(encoding="utf-8", errors="replace") if arguments.text else None
    report = verify_conversion(arguments.source, arguments.converted, text=text, dtype=arguments.dtype)
    print(report)
    return 0 if report else 1


def add_inspect(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("inspect", help="show what a model's streams and maps do with a text")
    parser.set_defaults(run=inspect)
    parser.add_argument(
        "model", metavar="FOLDER", help="a widened model, or a deepseek_v4 or glm5_next one; or a Hub id"
    )
    parser.add_argument("--text", type=Path, required=True, metavar="FILE", help="text whose beginning is read")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="REPORT", help="folder to be made; see index.html in it"
    )
    parser.add_argument("--base", metavar="BASE", help="the model before it was widened, to show the difference")
    parser.add_argument("--max-tokens", type=int, default=512, metavar="T", help="how much is read (default 512)")


def inspect(arguments: argparse.Namespace) -> int:
    from .inspection import inspect_streams

    text = arguments.text.read_text(encoding="utf-8", errors="replace")
    print(inspect_streams(arguments.model, text, arguments.out, base=arguments.base, max_tokens=arguments.max_tokens))
    return 0


def add_doctor(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("doctor", help="print versions, devices, the backend that would run, and families")
    parser.set_defaults(run=doctor)


def doctor(arguments: argparse.Namespace) -> int:
    import platform

    import torch

    from .modeling.families import supported_families

    print(f"python          {platform.python_version()} on {platform.system()} {platform.machine()}")
    # torch's own word for itself says which build it is
    versions = {package: _version(package) for package in _PACKAGES} | {"torch": torch.__version__}
    for package, found in versions.items():
        print(f"{package:<15} {found or 'not installed'}")
    for line in _devices():
        print(f"device          {line}")
    print(f"families        {', '.join(supported_families())}")
    return 0


def _devices() -> list[str]:
    """A line for each device: its name, and which backend "auto" takes there and why."""
    import torch

    from .ops.backends import choose_backend, explain_no_backend

    found = {"cpu": f"cpu ({torch.get_num_threads()} threads)"}
    for kind, module in (("cuda", torch.cuda), ("xpu", torch.xpu)):
        if module.is_available():
            found |= {f"{kind}:{i}": f"{kind}:{i} {module.get_device_name(i)}" for i in range(module.device_count())}
    if torch.backends.mps.is_available():
        found["mps"] = "mps"
    lines = []
    for device, name in found.items():
        # streams as a model of 4 would have them
        streams = torch.empty(1, 4, 8, device=device)
        chosen = choose_backend("auto", streams, n=4)
        fast = "native" if streams.device.type == "cpu" else "triton"
        why = explain_no_backend(fast, streams, n=4) or _REASONS[fast]
        lines.append(f"{name}: backend {chosen}, since {why}")
    return lines


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    sys.exit(main())
