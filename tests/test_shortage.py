"""What nobody is to blame for is recognised through whatever has wrapped it, and nothing else is."""

from __future__ import annotations

import errno
import os
import sqlite3

import pytest
import torch

from ens.shortage import is_disk_error, is_memory_error, is_shortage


def wrapped(error: BaseException, how: str) -> BaseException:
    try:
        try:
            raise error
        except BaseException as inner:
            if how == "cause":
                raise ValueError("it failed") from inner
            if how == "hidden":
                raise ValueError("it failed") from None
            raise ValueError("it failed")  # noqa: B904, the context is what is tested
    except ValueError as outer:
        return outer


DISK = [OSError(number, os.strerror(number)) for number in (
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG, errno.EIO)]
DISK += [sqlite3.OperationalError("database or disk is full"), sqlite3.OperationalError("disk I/O error")]  # type: ignore[list-item]
MEMORY = [MemoryError(), OSError(errno.ENOMEM, "no"), OSError(errno.EMFILE, "no"),
          torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
          RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
          RuntimeError("[ONNXRuntimeError] : 6 : bad allocation")]


@pytest.mark.parametrize("how", ["", "cause", "context", "hidden"])
@pytest.mark.parametrize("error", [*DISK, *MEMORY], ids=repr)
def test_a_shortage_is_one_however_it_is_wrapped(error: Exception, how: str) -> None:
    outer = wrapped(error, how) if how else error
    assert is_shortage(outer)
    assert is_disk_error(outer) == (error in DISK) and is_memory_error(outer) == (error in MEMORY)


@pytest.mark.parametrize("error", [ValueError("3 > 2"), RuntimeError("sizes do not fit"), KeyError("x"),
                                   FileNotFoundError(errno.ENOENT, "No such file"), NotADirectoryError("x")])
def test_nothing_else_is_one(error: Exception) -> None:
    assert not is_shortage(error) and not is_shortage(wrapped(error, "cause"))


def test_errors_that_lead_to_each_other_end() -> None:
    one, other = ValueError("1"), ValueError("2")
    one.__cause__, other.__cause__ = other, one
    assert not is_shortage(one)
