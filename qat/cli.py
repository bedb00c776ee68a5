"""Entry-point wrapper around Hydra: typed config in, one clear line for every mistake of the user's."""

import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qat.config import register_schemas, to_config
from qat.errors import CheckFailed, UserError

BUNDLED = Path(__file__).resolve().parent / "bundled"
ROOT = BUNDLED if BUNDLED.is_dir() else BUNDLED.parent.parent
"""Has configs/ and eval/: the repository, or where a wheel has them (pyproject.toml)."""
CONFIG_DIR = ROOT / "configs"

NOISE = ("object_type=", "reference_type=", "To append to your config", "See https://", "Config search", "provider=")
"""Lines of hydra's and omegaconf's errors that help nobody here."""


def entry_point(config_name: str, task: Callable[[Any], Any]) -> None:
    """Compose configs/<config_name>.yaml with the command line, hand the dataclass to `task`, map errors to exit codes.

    Exit codes: 0 done, 1 an error that is not the user's (with traceback), 2 a mistake of the user's, 3 a check that
    found something, 130 Ctrl-C.
    In a sweep a job that fails through the user's mistake does not stop the others.
    HYDRA_FULL_ERROR=1 shows the traceback behind a one-line error too.
    """
    import hydra
    from omegaconf import OmegaConf

    full = os.environ.get("HYDRA_FULL_ERROR") == "1"
    # hydra's own short errors are several lines long: take the exception and print it here
    os.environ["HYDRA_FULL_ERROR"] = "1"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    register_schemas()
    OmegaConf.register_new_resolver("run_dir", run_dir, replace=True)
    failures: list[int] = []
    here = os.getpid()

    @hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name=config_name)
    def run(config: Any) -> None:
        if os.getpid() != here:
            # a launcher's process: hydra takes to the sweep's own what a job raises
            task(to_config(config))
            return
        # caught here too, because hydra adds lines of its own to what leaves a job
        failures.append(exit_code(lambda: task(to_config(config)), full))

    sys.exit(max(exit_code(run, full), *failures, 0))


def compose(config_name: str, *overrides: str) -> Any:
    """The config dataclass that configs/<config_name>.yaml gives with these words of a command line.

    Raises:
        omegaconf.errors.OmegaConfBaseException: a value is missing or wrong.
    """
    import hydra
    from omegaconf import OmegaConf

    register_schemas()
    OmegaConf.register_new_resolver("run_dir", run_dir, replace=True)
    with hydra.initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        return to_config(hydra.compose(config_name, overrides=list(overrides)))


def run_dir(resume: str | None, fresh: str) -> str:
    """Folder of a run: that of the checkpoint <folder>/checkpoints/*.ckpt it goes on from, or a fresh one."""
    path = Path(resume or "").expanduser()
    # resolved, because `latest` may be part of it
    return str(path.resolve().parent.parent) if path.is_file() else fresh


def one_line(error: BaseException) -> str:
    """The error's own words on one line, and for a config error the key it is about."""
    lines = str(error).splitlines()
    cause = error.__cause__
    if cause is not None and type(cause).__module__.startswith("omegaconf"):
        lines += str(cause).splitlines()
    words: list[str] = []
    key = ""
    for line in lines:
        text = line.strip()
        if text.startswith("full_key: "):
            key = text.removeprefix("full_key: ")
        elif line.startswith("\t") and words and not text.startswith(NOISE):
            # hydra's list of what there is to choose from
            words[-1] += (" " if words[-1].endswith(":") else ", ") + text
        elif text and not text.startswith(NOISE):
            words.append(text)
    said = "; ".join(word.rstrip(".:") for word in words)
    if "hydra/launcher/submitit" in said:
        said += ", which pip install 'codecllm[sweep]' brings"
    return said if key in said else f"{key}: {said}"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it says that a GPU or the machine has no more memory to give."""
    # of the CPU torch has no class
    return isinstance(error, MemoryError) or any(
        words in str(error) for words in ("out of memory", "can't allocate memory", "not enough memory")
    )


def exit_code(call: Callable[[], Any], full: bool = False) -> int:
    """0, or what the error that `call` raised stands for, its line printed; errors of no user's are raised.

    Args:
        call: what to do.
        full: raise a user's mistake too, for its traceback.
    """
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException
    from rans_kernels.errors import DeviceError
    from rans_kernels.format import FormatError
    from rans_kernels.placement import BudgetError
    from yaml import YAMLError

    mistakes = (UserError, FormatError, DeviceError, BudgetError, HydraException, OmegaConfBaseException, YAMLError)
    try:
        call()
        return 0
    except KeyboardInterrupt as stop:
        print(f"\n{str(stop) or 'interrupted'}", file=sys.stderr)
        sys.exit(130)
    except CheckFailed as failure:
        print(f"failed: {failure}", file=sys.stderr)
        return 3
    except mistakes as error:
        if full:
            raise
        print(f"error: {one_line(error)}", file=sys.stderr)
    except (RuntimeError, MemoryError) as error:
        if full or not is_out_of_memory(error):
            raise
        what = one_line(error) or "out of memory"
        print(f"error: too little memory: {what}; free some, or take a smaller batch, model or dtype", file=sys.stderr)
    except OSError as error:
        if full or error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EIO):
            raise
        print(f"error: {error.strerror or error}: {error.filename or 'while writing'}", file=sys.stderr)
    return 2
