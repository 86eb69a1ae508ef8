# SPDX-License-Identifier: Apache-2.0
"""A file is whole or not there, whatever happens while it is written."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from mustdrop_kernels.files import write_text, written_whole


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, SystemExit])
@pytest.mark.parametrize("old", ["before", None])
def test_an_interrupt_leaves_what_was_there(tmp_path: Path, error: type[BaseException], old: str | None) -> None:
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


def test_what_is_written_has_the_usual_mode_and_ending(tmp_path: Path) -> None:
    path, plain = tmp_path / "picture.png", tmp_path / "plain"
    plain.touch()
    with written_whole(path) as scratch:
        assert scratch.suffix == ".png"
        assert scratch.parent == path.parent
        scratch.write_bytes(b"whole")
    assert path.read_bytes() == b"whole"
    assert stat.S_IMODE(os.stat(path).st_mode) == stat.S_IMODE(os.stat(plain).st_mode)


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        write_text(tmp_path / "nowhere" / "x.json", "")
