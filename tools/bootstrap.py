"""Make the private virtual environment: `python tools/bootstrap.py .venv`. Standard library only.

torch comes first, because a plain `pip install torch` on Linux brings several gigabytes of CUDA libraries that a
machine without a GPU has no use for. Where there is no GPU the CPU build is taken from, in this order: what pip is
already configured with, then uv, which knows where PyTorch publishes its builds. Where both fail the plain package
works too.
"""

import platform
import shutil
import subprocess
import sys
import venv
from pathlib import Path

CPU_TORCH = "torch==2.13.0"


def has_gpu() -> bool:
    """True if an NVIDIA or AMD driver answers on this machine."""
    return any(
        shutil.which(tool) and subprocess.run([tool], capture_output=True).returncode == 0
        for tool in ("nvidia-smi", "rocm-smi")
    )


def install_torch(python: str) -> None:
    """Install the build of torch that fits this machine, unless one is there."""
    if subprocess.run([python, "-c", "import torch"], capture_output=True).returncode == 0:
        return
    pip = [python, "-m", "pip", "install", "--quiet"]
    if platform.system() != "Linux" or has_gpu():
        subprocess.run([*pip, "torch>=2.11,<2.16"], check=True)
        return
    print("no GPU found: taking the CPU build of torch", flush=True)
    if subprocess.run([*pip, f"{CPU_TORCH}+cpu"], capture_output=True).returncode == 0:
        return
    subprocess.run([*pip, "uv"], check=True)
    uv = [python, "-m", "uv", "pip", "install", "--python", python, "--torch-backend", "cpu", CPU_TORCH]
    if subprocess.run(uv).returncode != 0:
        print("the CPU build was not to be had; installing the default build", flush=True)
        subprocess.run([*pip, CPU_TORCH], check=True)


def main(folder: str) -> None:
    """Create the environment in `folder` and install the project into it with its development tools."""
    if not (3, 11) <= sys.version_info[:2] < (3, 14):
        version = platform.python_version()
        sys.exit(f"error: codecllm needs Python 3.11 to 3.13, this is {version}; run make PYTHON=python3.12")
    root = Path(__file__).resolve().parent.parent
    if not Path(folder, "bin", "python").exists():
        venv.create(folder, with_pip=True)
    python = str(Path(folder, "bin", "python").absolute())
    install_torch(python)
    print("installing codecllm and what it needs", flush=True)
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--editable", f"{root}[dev]"], check=True)


if __name__ == "__main__":
    main(*sys.argv[1:] or [".venv"])
