"""Entry-point wrapper around Hydra: typed config in, one clear line for every mistake of the user's."""

import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qat.config import register_schemas, to_config
from qat.errors import UserError

CONFIG_DIR = Path(__file__).resolve().parent.parent / "configs"


def entry_point(config_name: str, task: Callable[[Any], Any]) -> None:
    """Compose configs/<config_name>.yaml with the command line, hand the dataclass to `task`, map errors to exit codes.

    Exit codes: 0 done, 1 an error that is not the user's (with traceback), 2 a mistake of the user's, 130 Ctrl-C.
    HYDRA_FULL_ERROR=1 shows the traceback behind a one-line error too.
    """
    import hydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException
    from rans_kernels.format import FormatError

    full = os.environ.get("HYDRA_FULL_ERROR") == "1"
    # hydra's own short errors are several lines long: take the exception and print it here
    os.environ["HYDRA_FULL_ERROR"] = "1"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    register_schemas()

    @hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name=config_name)
    def run(config: Any) -> Any:
        return task(to_config(config))

    try:
        run()
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
    except (UserError, FormatError, HydraException, OmegaConfBaseException) as error:
        if full:
            raise
        print(f"error: {one_line(error)}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if full or error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def one_line(error: BaseException) -> str:
    """The error's own words on one line, and for a config error the key it is about."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    cause = error.__cause__
    if cause is not None and type(cause).__module__.startswith("omegaconf"):
        lines += [line.strip() for line in str(cause).splitlines() if line.strip()]
    keep = [line for line in dict.fromkeys(lines) if not line.startswith(("object_type=", "reference_type="))]
    return " | ".join(keep)
