# SPDX-License-Identifier: Apache-2.0
"""The entry points, and what they say where something is missing."""

from __future__ import annotations

import sys

import pytest
from processes import output_of_python, run_python

import mustdrop_kernels
from mustdrop_kernels import cli


def test_module_prints_the_version() -> None:
    done = run_python("-m", "mustdrop_kernels", "--version")
    assert done.returncode == 0
    assert done.stdout == f"mustdrop_kernels {mustdrop_kernels.__version__}\n"
    assert done.stderr == ""


def test_help_names_the_commands(mustdrop) -> None:
    result = mustdrop("--help")
    assert result.exit_code == 0
    assert "doctor" in result.stdout
    assert "demo" in result.stdout


def test_without_words_help_is_printed(mustdrop) -> None:
    assert "doctor" in mustdrop().output


@pytest.mark.parametrize("missing", [["rich"], ["typer"], ["typer", "rich"]])
def test_missing_packages_are_one_sentence(missing, monkeypatch) -> None:
    for name in missing:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    message = str(stopped.value)
    assert message == f"mustdrop: the command line needs {' and '.join(missing)}: pip install 'mustdrop_kernels[cli]'"


def test_version_needs_no_engine() -> None:
    """`mustdrop --version` and `doctor` start quickly: no model library is imported for them."""
    code = "import sys, mustdrop_kernels.cli.app; print(sorted({'transformers', 'matplotlib'} & set(sys.modules)))"
    assert output_of_python("-c", code).strip() == "[]"
