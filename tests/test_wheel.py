"""The wheel has every file of the repository that a command reads, and works from any folder."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("setuptools.build_meta", reason="setuptools is not installed")

ROOT = Path(__file__).resolve().parent.parent
PLACES = {
    "qat": "qat",
    "kernels/rans_kernels": "rans_kernels",
    "configs": "qat/bundled/configs",
    "eval": "qat/bundled/eval",
}
"""Folders of the repository, and where the wheel has them."""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, in which building may leave what it likes."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE", *PLACES):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).symlink_to(ROOT / name)
    code = "import sys, setuptools.build_meta as backend; print(backend.build_wheel(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", code, str(source)], cwd=source, check=True, capture_output=True)
    (found,) = source.glob("*.whl")
    return found


def test_everything_that_runs_is_in_the_wheel(wheel: Path) -> None:
    expected = {
        f"{there}/{path.as_posix()}"
        for here, there in PLACES.items()
        for path in (file.relative_to(ROOT / here) for file in (ROOT / here).rglob("*") if file.is_file())
        if path.suffix != ".md" and not {"__pycache__", "local"} & {*path.parts}
    }
    found = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert found == expected


def test_settings_and_programs_are_found_outside_of_the_repository(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    (tmp_path / "empty").mkdir()
    code = """
import qat.cli
print(qat.cli.compose("export", "source=a", "output=b", "quant=std").quant.scale.value)
print((qat.cli.ROOT / "eval" / "harness.py").is_file(), qat.cli.__file__)
"""
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    options: dict[str, Any] = {"cwd": tmp_path / "empty", "env": environment, "text": True, "check": True}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, **options)
    assert done.stdout.split() == ["std", "True", str(tmp_path / "site" / "qat" / "cli.py")]
