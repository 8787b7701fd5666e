"""Prints the machine and the versions of the packages that training needs; the first part of first_minutes.sh.

python tests/gpu/machine.py [--dry-run]

Exit codes: 0 all is there; 1 a package is missing or torch is too old; 2 there is no CUDA device (--dry-run needs none).
"""

from __future__ import annotations

import importlib
import subprocess
import sys
from importlib.metadata import version

PACKAGES = ("torch", "numpy", "scipy", "pyarrow", "monai", "nibabel", "pydantic", "pytest")
OLDEST_TORCH = (2, 11)


def main(arguments: list[str]) -> int:
    """Print one line per fact."""
    missing = [name for name in PACKAGES if not importable(name)]
    print(f"Python {sys.version.split()[0]};", "; ".join(f"{n} {version(n)}" for n in PACKAGES if n not in missing))
    if missing:
        print(f"missing: {', '.join(missing)}; --wheels FOLDER takes them from a folder of wheels")
        return 1
    import torch

    if tuple(map(int, torch.__version__.split(".")[:2])) < OLDEST_TORCH:
        print(f"torch {torch.__version__} is too old: {'.'.join(map(str, OLDEST_TORCH))} or newer is needed")
        return 1
    if not torch.cuda.is_available():
        print("no CUDA device")
        return 0 if arguments == ["--dry-run"] else 2
    device = torch.cuda.get_device_properties(0)
    print(f"driver {driver()}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}")
    print(f"{torch.cuda.device_count()} x {device.name}, {device.total_memory / 2**30:.0f} GiB")
    return 0


def importable(name: str) -> bool:
    """Whether a package is installed and its import works."""
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True


def driver() -> str:
    """The version of the NVIDIA driver as nvidia-smi says it; "unknown" without that program."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
