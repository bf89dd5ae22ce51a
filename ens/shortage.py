"""What passes and is nobody's fault: memory, disk space and rights that run out, however many libraries wrapped it."""

from __future__ import annotations

import errno
from collections.abc import Iterator

_DISK_ERRNO = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG, errno.EIO}
_DISK_WORDS = ("disk is full", "readonly database", "No space left", "disk I/O error", "Permission denied",
               "File too large", "unable to open database file")
_SCARCE_ERRNO = {errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EAGAIN}
# PyTorch on CPU and GPU, C++, oneDNN and ONNX Runtime: none of them raises Python's MemoryError.
_SCARCE_WORDS = ("out of memory", "allocate memory", "bad_alloc", "bad allocation", "Failed to allocate",
                 "Too many open files", "can't start new thread")


def is_disk_error(error: BaseException) -> bool:
    """Whether a disk that is full, failing, read-only or closed to this user is behind an error."""
    return any(getattr(one, "errno", None) in _DISK_ERRNO or any(word in str(one) for word in _DISK_WORDS)
               for one in _chain(error))


def is_memory_error(error: BaseException) -> bool:
    """Whether memory, threads or open files that ran out are behind an error."""
    return any(isinstance(one, MemoryError) or getattr(one, "errno", None) in _SCARCE_ERRNO
               or any(word in str(one) for word in _SCARCE_WORDS) for one in _chain(error))


def is_shortage(error: BaseException) -> bool:
    """Whether the same work may succeed on a machine with more room: no result and no genotype is to blame."""
    return is_disk_error(error) or is_memory_error(error)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and all that led to it: `raise … from None` hides the cause from people, not from this."""
    waiting, seen = [error], set()
    while waiting:
        one = waiting.pop()
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            yield one
            waiting += [one.__cause__, one.__context__]
