"""Whether a file can be written is known before it is written, and nothing is left of finding out."""

from __future__ import annotations

import os
import threading

import pytest

from quantlens.errors import StorageError
from quantlens.files import check_writable, write_whole


def test_what_can_be_written_leaves_nothing(tmp_path):
    (tmp_path / "old.json").write_text("old")
    for path in (None, tmp_path / "a.json", str(tmp_path / "new" / "folder" / "a.json"), tmp_path / "old.json"):
        check_writable(path)
    assert [p.name for p in tmp_path.rglob("*")] == ["old.json"]
    assert (tmp_path / "old.json").read_text() == "old"


@pytest.mark.parametrize("place", ["file/a.json", "file/more/a.json", "folder", "/proc/quantlens/a.json"])
def test_what_cannot_be_written_is_refused(tmp_path, place):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    path = tmp_path / place
    with pytest.raises(StorageError, match=r"cannot write the table .*choose another place"):
        check_writable(path, what="the table")
    with pytest.raises(StorageError):
        write_whole(path, "text")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with a name")
def test_a_pipe_is_written_to_and_stays(tmp_path):
    pipe, found = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: found.append(pipe.read_bytes()), daemon=True)
    reader.start()
    check_writable(pipe)
    write_whole(pipe, "text")
    reader.join(10)
    assert found == [b"text"]
    assert pipe.is_fifo()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(StorageError, match="Permission denied"):
        check_writable(tmp_path / "a.json")
    tmp_path.chmod(0o700)
