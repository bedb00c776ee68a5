"""Tasks of eval/tasks, which read the user's own files, and lm-eval's, by their names."""

import json
from pathlib import Path
from typing import Any

import yaml
from lm_eval.tasks import TaskManager

from qat.errors import UserError

TASKS = Path(__file__).resolve().parent / "tasks"


def find_tasks(
    names: Any, data_dir: str | None, text: Any = None, metadata: dict[str, Any] | None = None
) -> tuple[list[str | dict[str, Any]], TaskManager]:
    """What lm-eval is to run.

    Args:
        names: a name or a list of them: of eval/tasks/*.yaml, of a YAML file's path, or of lm-eval's own.
        data_dir: folder of the files that the tasks of eval/tasks read, or the file of the only one.
        text: the file that text_perplexity reads in place of one in data_dir: .txt or .jsonl.
        metadata: for lm-eval's tasks that take some.

    Returns:
        The tasks, those of eval/tasks as dicts, and a manager that knows the others.

    Raises:
        UserError: none given, an unknown one, or a missing, damaged or empty data file.
    """
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list | tuple) or not names:
        raise UserError(f"no tasks: give tasks=[...] with some of {', '.join(_local_names())}, or lm-eval's own")
    tasks: list[str | dict[str, Any]] = []
    for name in map(str, names):
        if name in _local_names():
            tasks.append(_local_task(name, data_dir, text if name == "text_perplexity" else None))
        elif name.endswith((".yaml", ".yml")) and not Path(name).is_file():
            raise UserError(f"no such task file: {name}")
        else:
            tasks.append(name)
    others = [task for task in tasks if isinstance(task, str)]
    # it takes lm-eval seconds to find its thousands of tasks
    manager = TaskManager(include_defaults=bool(others), metadata=metadata)
    for name in others:
        if name not in manager.all_tasks and not Path(name).is_file():
            raise UserError(
                f"unknown task {name}: give one of {', '.join(_local_names())}, the path of a YAML file, "
                "or a task of lm-eval (`lm_eval ls tasks` lists them)"
            )
    return tasks, manager


def _local_names() -> list[str]:
    return sorted(path.stem for path in TASKS.glob("*.yaml"))


def _local_task(name: str, data_dir: str | None, text: Any) -> dict[str, Any]:
    """The YAML of eval/tasks/<name>.yaml with its data file made absolute and looked into."""
    task = yaml.safe_load((TASKS / f"{name}.yaml").read_text(encoding="utf-8"))
    kwargs, where = task["dataset_kwargs"], data_dir if text is None else text
    file = kwargs["data_files"]["test"]
    if where is None:
        raise UserError(f"{name} reads {file}: give data_dir=..., the folder it is in")
    path = Path(str(where)).expanduser().resolve()
    path = path / file if path.is_dir() or text is None and path.suffix not in (".txt", ".jsonl") else path
    if not path.is_file():
        key = "data_dir" if text is None else "text"
        raise UserError(f"{name} reads {path}, which does not exist: check {key}={where}")
    kwargs["data_files"]["test"] = str(path)
    with open(path, encoding="utf-8") as lines:
        first = next((line for line in lines if line.strip()), None)
    if first is None:
        raise UserError(f"{path} is empty")
    if name == "text_perplexity" and path.suffix != ".jsonl":
        # all of the file is one text
        task["dataset_path"], kwargs["sample_by"] = "text", "document"
        return task
    try:
        keys = json.loads(first).keys()
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path} does not hold one JSON object a line") from error
    if missing := [key for key in task["metadata"]["keys"] if key not in keys]:
        raise UserError(f"{path} has no key {missing[0]!r}; {name} needs {', '.join(task['metadata']['keys'])}")
    return task
