"""Weights in mapped files, whose pages count as memory of the process for as long as anything of the file is held."""

import ctypes
import mmap
import sys
from pathlib import Path

from torch import Tensor


class MappedFiles:
    """Files that are mapped when it is made, of which only Linux tells."""

    def __init__(self) -> None:
        self._ranges: list[tuple[int, int]] = []
        if sys.platform.startswith("linux"):
            # By newlines alone, which are escaped in names of files there, as no other end of a line is.
            for line in Path("/proc/self/maps").read_bytes().decode("utf-8", "replace").rstrip("\n").split("\n"):
                span, _, _, _, inode, *_ = line.split(None, 5)
                start, _, end = span.partition("-")
                if inode != "0":
                    self._ranges.append((int(start, 16), int(end, 16)))

    def forget(self, tensor: Tensor) -> int:
        """Give back the memory of a tensor that lies in a file and has not been written to; bytes that were given.

        Whoever reads it again finds the numbers of the file. A tensor that is in no file stays as it is.
        """
        first, last = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        if not tensor.nbytes or not any(start <= first and last <= end for start, end in self._ranges):
            return 0
        start = -(-first // mmap.PAGESIZE) * mmap.PAGESIZE
        length = last // mmap.PAGESIZE * mmap.PAGESIZE - start
        madvise = ctypes.CDLL(None, use_errno=True).madvise
        madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        return length if length > 0 and madvise(start, length, mmap.MADV_DONTNEED) == 0 else 0
