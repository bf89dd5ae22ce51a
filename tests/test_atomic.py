"""A file is the old one or the whole new one, whatever happens on the way."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ens.atomic import atomic_path, is_temporary, sweep, write_atomic


def test_a_file_appears_whole_with_the_mode_of_the_umask_and_nothing_beside_it(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_atomic(tmp_path / "new" / "file.bin", b"data")
    finally:
        os.umask(before)
    assert (tmp_path / "new" / "file.bin").read_bytes() == b"data"
    assert (tmp_path / "new" / "file.bin").stat().st_mode & 0o777 == 0o640
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["file.bin"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_failed_write_leaves_the_old_file_and_no_temporary_one(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "file.bin"
    write_atomic(path, b"old")
    with pytest.raises(error), atomic_path(path) as temporary:
        temporary.write_bytes(b"half")
        assert is_temporary(temporary) and not is_temporary(path)
        raise error
    assert path.read_bytes() == b"old" and [found.name for found in tmp_path.iterdir()] == ["file.bin"]


def test_the_data_is_on_disk_before_the_name_points_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (calls.append("fsync"), fsync(handle)))
    monkeypatch.setattr(os, "replace", lambda source, target: (calls.append("replace"), replace(source, target)))
    write_atomic(tmp_path / "file.bin", b"data")
    assert calls == ["fsync", "replace"]


def test_long_names_fit(tmp_path: Path) -> None:
    write_atomic(tmp_path / ("x" * 250), b"data")
    assert (tmp_path / ("x" * 250)).read_bytes() == b"data"


WRITER = """
import os, sys, time
from pathlib import Path
from ens.atomic import atomic_path
with atomic_path(Path(sys.argv[1])) as temporary:
    temporary.write_bytes(b"half")
    print(temporary, flush=True)
    time.sleep(60)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL and flock")
def test_what_a_killed_process_left_is_swept_and_what_a_living_one_writes_is_not(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file.bin"
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True,
                               encoding="utf-8")
    assert process.stdout is not None
    temporary = Path(process.stdout.readline().strip())
    (tmp_path / ".mine.tmp").touch()
    sweep(tmp_path)
    write_atomic(path, b"other")
    assert temporary.read_bytes() == b"half", "its writer lives"
    process.kill()
    process.communicate()
    write_atomic(tmp_path / "deep" / "another.bin", b"")
    assert temporary.exists(), "another file's"
    sweep(tmp_path)
    assert not temporary.exists() and (tmp_path / ".mine.tmp").exists() and path.read_bytes() == b"other"


def test_the_next_write_of_a_file_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    for name in (".out.png.01234567.tmp", ".out.jpg.01234567.tmp"):
        (tmp_path / name).touch()
    write_atomic(tmp_path / "out.png", b"")
    assert sorted(found.name for found in tmp_path.iterdir()) == [".out.jpg.01234567.tmp", "out.png"]
