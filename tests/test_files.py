# SPDX-License-Identifier: Apache-2.0
"""Atomic writes: an interrupted write leaves the previous file or none."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from mustdrop_kernels.files import folder_written_whole, write_text, written_whole


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, SystemExit])
@pytest.mark.parametrize("old", ["before", None])
def test_an_interrupt_leaves_the_previous_file(tmp_path: Path, error: type[BaseException], old: str | None) -> None:
    path = tmp_path / "report.json"
    if old is not None:
        path.write_text(old)

    def interrupted() -> None:
        with written_whole(path) as scratch:
            scratch.write_text("half of i")
            raise error

    with pytest.raises(error):
        interrupted()
    assert [p.name for p in tmp_path.iterdir()] == ([] if old is None else ["report.json"])
    assert old is None or path.read_text() == old


def test_written_files_have_the_usual_mode_and_ending(tmp_path: Path) -> None:
    path, plain = tmp_path / "picture.png", tmp_path / "plain"
    plain.touch()
    with written_whole(path) as scratch:
        assert scratch.suffix == ".png"
        assert scratch.parent == path.parent
        scratch.write_bytes(b"whole")
    assert path.read_bytes() == b"whole"
    assert stat.S_IMODE(os.stat(path).st_mode) == stat.S_IMODE(os.stat(plain).st_mode)


def test_missing_folders_are_created(tmp_path: Path) -> None:
    write_text(tmp_path / "a" / "b" / "report.json", "whole")
    assert (tmp_path / "a" / "b" / "report.json").read_text() == "whole"


@pytest.mark.parametrize("old", [True, False])
def test_a_folder_is_replaced_atomically(tmp_path: Path, old: bool) -> None:
    folder = tmp_path / "model"
    if old:
        folder.mkdir()
        (folder / "before").touch()

    def interrupted() -> None:
        with folder_written_whole(folder) as scratch:
            (scratch / "half").touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")] == (["model", "model/before"] if old else [])
    with folder_written_whole(folder) as scratch:
        (scratch / "whole").touch()
    assert [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")] == ["model", "model/whole"]
