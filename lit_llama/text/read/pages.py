"""Parquet's page headers, looked at before Arrow believes them: it allocates whatever size a damaged one names.

A header is a Thrift struct in the compact protocol; field 3 of it is the number of bytes that the page takes.
"""

from pathlib import Path
from typing import Any, BinaryIO

_SLACK = 100  # bytes by which old writers told too small a size of a column
_LONGEST = 1 << 24  # bytes of a header, which may hold the smallest and the largest value of its page
_COMPRESSED_SIZE = 3
_TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _LIST, _STRUCT = 1, 2, 3, 4, 5, 6, 7, 8, 9, 12


def check_pages(path: Path, metadata: Any) -> None:
    """Follow all pages of a Parquet file, without reading them.

    Args:
        path: The file.
        metadata: Its footer, as pyarrow gives it.

    Raises:
        ValueError: A column or a page would not fit where it stands.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        for group in range(metadata.num_row_groups):
            for index in range(metadata.num_columns):
                column = metadata.row_group(group).column(index)
                begins = [column.data_page_offset, column.dictionary_page_offset if column.has_dictionary_page else 0]
                # No page stands at 0: there is none of that kind.
                start, length = min(filter(None, begins), default=0), column.total_compressed_size
                if start < 0 or length < 0 or start + length > size:
                    raise ValueError(f"column {column.path_in_schema} does not fit into the file")
                _check_column(file, start, start + length)


def _check_column(file: BinaryIO, at: int, end: int) -> None:
    while at < end:
        header, page = _header(file, at, end)
        if page < 0 or at + header + page > end + _SLACK:
            raise ValueError(f"the page at byte {at} is said to have {page} bytes, expected at most {end - at}")
        at += header + page


def _header(file: BinaryIO, at: int, end: int) -> tuple[int, int]:
    """Bytes of a header, and of the page behind it."""
    length = 256
    while True:
        file.seek(at)
        thrift = _Thrift(file.read(length))
        try:
            page = thrift.struct(_COMPRESSED_SIZE)
            return thrift.at, page
        except IndexError as error:
            if length > min(end - at, _LONGEST):
                raise ValueError(f"the page header at byte {at} does not end") from error
            length *= 16


class _Thrift:
    """Reads values one after another; IndexError where the bytes end."""

    def __init__(self, data: bytes) -> None:
        self._data, self.at = data, 0

    def struct(self, wanted: int = 0) -> int:
        """Pass over a struct; gives its integer field `wanted`, 0 if there is none."""
        number = found = 0
        while head := self._byte():
            number = number + (head >> 4) if head >> 4 else self._integer()
            value = self._value(head & 15)
            found = value if number == wanted else found
        return found

    def _value(self, kind: int) -> int:
        if kind in (_I16, _I32, _I64):
            return self._integer()
        if kind == _STRUCT:
            return self.struct()
        if kind == _LIST:
            head = self._byte()
            for _ in range(head >> 4 if head >> 4 < 15 else self._varint()):
                self._value(head & 15)
        elif kind in (_BYTE, _DOUBLE, _BINARY):
            length = {_BYTE: 1, _DOUBLE: 8}.get(kind) or self._varint()
            self.at += length
        elif kind not in (_TRUE, _FALSE):
            raise ValueError(f"a page header has a field of the unknown type {kind}")
        return 0

    def _byte(self) -> int:
        self.at += 1
        return self._data[self.at - 1]

    def _varint(self) -> int:
        value = 0
        for shift in range(0, 70, 7):
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise ValueError("a page header has a number without an end")

    def _integer(self) -> int:
        value = self._varint()
        return value >> 1 ^ -(value & 1)
