# SPDX-License-Identifier: Apache-2.0
"""``mustdrop doctor``: serving backends, reasons of the others, and the next step. Never raises."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .. import _load, backends
from . import environment, selfcheck

REFERENCE_ONLY = "the reference backend works: mustdrop_kernels.use_backend('reference')"
_REBUILD = "Rebuild in the source folder: pip install --force-reinstall --no-deps ."


def examine() -> dict[str, Any]:
    """The document of `mustdrop doctor`, in plain JSON types."""
    absent = {device: environment.absent(device) for device in backends.ORDER}
    present = [device for device, reason in absent.items() if reason is None]
    found: dict[str, Any] = {
        "versions": environment.versions(),
        "machine": environment.machine(),
        "environment": environment.variables(),
        "engines": environment.engines(),
        "libraries": environment.libraries(),
        "build": environment.build(),
        "sources": environment.sources(),
        "backends": {name: backend.description for name, backend in backends.registered().items()},
        "devices": [{"device": device, "absent": reason} for device, reason in absent.items()],
        "operators": environment.operators(),
        "self_check": [check.to_dict() for device in present for check in selfcheck.check_all(device)],
    }
    problems, advice = assess(found, present)
    return {"ok": not problems, **found, "problems": problems, "next": advice}


# ------------------------------------------------------------------------------------------------ what to do next


def assess(found: dict[str, Any], present: list[str]) -> tuple[list[str], list[str]]:
    """Problems, which determine the exit status, and next steps."""
    if not _load.core.loaded:
        return [str(_load.core.problem)], _repair_library(found)
    chosen = os.environ.get("MUSTDROP_BACKEND")
    if chosen and chosen not in backends.registered():
        names = ", ".join(backends.registered())
        problem = f"MUSTDROP_BACKEND={chosen}: there is no such backend, so every operator refuses"
        return [problem], [f"Unset MUSTDROP_BACKEND, or set it to one of {names}."]
    problems, advice = [], []
    if (plugin := found["engines"]["vLLM, here"]).startswith("broken: "):
        problems.append(f"vLLM would refuse to start: {plugin.removeprefix('broken: ')}")
        advice.append("Unset MUSTDROP_VLLM, or correct it.")
    if failed := [check for check in found["self_check"] if check["status"] != "passes"]:
        names = ", ".join(sorted({f"{check['op']} on {check['backend']}" for check in failed}))
        problems.append(f"the self-check failed: {names}")
        advice.append(f"{_REBUILD}; if that does not help, report it with the output of `mustdrop doctor --json`.")
    unserved = {device: _unserved(found, device) for device in backends.ORDER}
    if all(unserved[device] for device in present):
        problems.append(f"no device here has every operator; the CPU lacks {', '.join(unserved['cpu'])}")
        remedy = f"Unset MUSTDROP_BACKEND={chosen}" if chosen else _REBUILD
        advice.append(f"{remedy}; {REFERENCE_ONLY}.")
    if torch.version.cuda is not None and _load.cuda.path.is_file() and not _load.cuda.loaded:
        problems.append(str(_load.cuda.problem))
        advice.append(f"{_REBUILD}, or install the wheel again.")
    advice += _advice_for_gpu(found, unserved["cuda"])
    if isinstance(found["build"], dict) and found["build"].get("version") != found["versions"]["mustdrop_kernels"]:
        advice.append(f"The library is of version {found['build'].get('version')}. {_REBUILD}.")
    return problems, advice or [_try_it()]


def _unserved(found: dict[str, Any], device: str) -> list[str]:
    return [row["op"] for row in found["operators"] if row["device"] == device and row["served_by"] is None]


def _repair_library(found: dict[str, Any]) -> list[str]:
    if _load.core.path.is_file():
        first = f"{_REBUILD} (this torch is {found['versions']['torch']})."
    elif found["versions"]["C++ compiler"] is None:
        first = "Install a C++ compiler (Debian: apt install g++), then in the source folder: pip install ."
    else:
        first = "Build the library in the source folder: pip install . (in place: python setup.py build_ext --inplace)."
    return [first, f"Until then {REFERENCE_ONLY}."]


def _advice_for_gpu(found: dict[str, Any], unserved: list[str]) -> list[str]:
    if environment.absent("cuda") is not None:
        hidden = isinstance(found["machine"]["GPUs"], list) and found["machine"]["GPUs"]
        return ["There is a GPU that torch does not find: install a torch with CUDA (pytorch.org)."] if hidden else []
    if not unserved:
        return []
    if environment.find_nvcc():
        return [
            "No backend serves the GPU: build the CUDA library, nvcc is there: "
            "pip install --force-reinstall --no-deps ."
        ]
    cupy = f"pip install cupy-cuda{str(torch.version.cuda).split('.')[0]}x, or " if torch.version.cuda else ""
    return [f"No backend serves the GPU: pip install triton, or {cupy}install the CUDA toolkit (nvcc) and build again."]


def _try_it() -> str:
    wanted = ("transformers", "PIL", "matplotlib")
    missing = [name for name in wanted if importlib.util.find_spec(name) is None]
    if missing:
        return "The operators work. For the demo: pip install 'mustdrop_kernels[demo]', then `mustdrop demo`."
    return "The operators work. See them on a picture: `mustdrop demo`."


# --------------------------------------------------------------------------------------------------------- printing


def show(found: dict[str, Any], console: Console) -> None:
    """Print the document of `examine`."""
    console.print(_pairs("Versions", found["versions"], missing="not installed"))
    console.print(_pairs("Machine", found["machine"], missing="unknown"))
    build = found["build"] if isinstance(found["build"], dict) else {"_native": found["build"]}
    console.print(_pairs("This build", {**build, "sources": _sources(found["sources"])}, missing="none"))
    console.print(_environment(found["environment"]))
    console.print(_pairs("Dropping tokens", found["engines"], missing=""))
    console.print(_libraries(found["libraries"]))
    console.print(_operators(found))
    console.print(_reasons(found))
    _ending(found, console)


def _sources(found: dict[str, Any]) -> str | None:
    """The digest of the libraries' sources, and whether it is that of the tree around the package."""
    if not found["libraries_of"]:
        return None
    remark = {True: ", as the sources here", False: ", others than the sources here: build again", None: ""}
    return f"{found['libraries_of'][:16]}{remark[found['same']]}"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", header_style="dim", show_edge=False, box=None)
    table.show_header = any(columns)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _text(value: Any, missing: str = "") -> str:
    if isinstance(value, (list, tuple)):
        return escape(", ".join(map(str, value))) or "none"
    if value is None or value == "":
        return f"[dim]{missing}[/]"
    text = escape(str(value))
    return f"[red]{text}[/]" if text.startswith("broken:") else text


def _pairs(title: str, values: dict[str, Any], missing: str) -> Table:
    table = _table(f"\n{title}", "", "")
    for name, value in values.items():
        table.add_row(f"  {escape(name)}", _text(value, missing))
    return table


def _environment(values: dict[str, str]) -> Table:
    """All variables that this package reads, and other relevant ones that are set."""
    table = _table("\nEnvironment", "", "", "")
    for name in dict.fromkeys((*environment.VARIABLES, *values)):
        table.add_row(f"  {name}", _text(values.get(name), missing="not set"), environment.VARIABLES.get(name, ""))
    return table


def _libraries(rows: list[dict[str, Any]]) -> Table:
    table = _table("\nLibraries", "", "", "")
    for row in rows:
        state = "[green]loaded[/]" if row["loaded"] else "[yellow]not loaded[/]"
        table.add_row(f"  {row['name']}", state, escape(row["problem"] or row["path"]))
    return table


def _operators(found: dict[str, Any]) -> Table:
    absent = {row["device"]: row["absent"] for row in found["devices"]}
    served = {(row["op"], row["device"]): row["served_by"] for row in found["operators"]}
    table = _table("\nOperators: who serves torch.ops.mustdrop", "  operator", *absent, "self-check against reference")
    for op in backends.OPS:
        cells = [_server(served[op, device], absent[device]) for device in absent]
        table.add_row(f"  {op}", *cells, _verdicts([check for check in found["self_check"] if check["op"] == op]))
    return table


def _server(name: str | None, absent: str | None) -> str:
    if name is None:
        return "[dim]no device[/]" if absent else "[red]none[/]"
    return f"[green]{escape(name)}[/]" if not name.startswith("broken:") else f"[red]{escape(name)}[/]"


def _verdicts(checks: list[dict[str, Any]]) -> str:
    if not checks:
        return "[dim]nothing to compare[/]"
    verdicts = []
    for check in checks:
        who = f"{check['backend']} on {check['device']}"
        passed = check["status"] == "passes"
        verdicts.append(
            f"[green]{who} passes[/]" if passed else f"[red]{who} {check['status']}:[/] {_text(check['detail'])}"
        )
    return "; ".join(verdicts)


def _reasons(found: dict[str, Any]) -> Table:
    """One line for all operators that share device, backend and reason."""
    reasons: dict[tuple[str, str, str], list[str]] = {}
    for row in found["operators"]:
        for name, reason in row["why_not"].items():
            if reason is not None:
                reasons.setdefault((row["device"], name, reason), []).append(row["op"])
    table = _table("\nWhy the other backends do not", "  device", "backend", "operators", "reason")
    for (device, name, reason), ops in sorted(reasons.items()):
        table.add_row(f"  {device}", name, _which(ops), escape(reason))
    return table


def _which(ops: list[str]) -> str:
    if len(ops) == len(backends.OPS):
        return "all"
    return ", ".join(ops) if len(ops) <= 3 else f"{len(ops)} of {len(backends.OPS)}"


def _ending(found: dict[str, Any], console: Console) -> None:
    console.print()
    for problem in found["problems"]:
        console.print(f"[red bold]Problem:[/] {escape(problem)}", highlight=False, soft_wrap=True)
    for line in found["next"]:
        console.print(f"[bold]Next:[/] {escape(line)}", highlight=False, soft_wrap=True)
