"""Arrays that grow beyond memory: kept in a file without a name, which goes with the process, and mapped when they are whole."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import IO, Any

import numpy as np

HELD = 1 << 22  # bytes in memory before the first is written


class Spool:
    """One array, a piece at a time. Where its file cannot be made, or written any further, it is held in memory."""

    def __init__(self, dtype: Any, folder: Path | None) -> None:
        self.dtype, self.folder = np.dtype(dtype), folder
        self.size = 0
        self._held: list[np.ndarray] = []
        self._bytes = 0
        self._file: IO[bytes] | None = None
        self._written = 0

    def add(self, piece: np.ndarray) -> None:
        """Append a piece, of any dtype that casts to the array's."""
        self._held.append(piece.astype(self.dtype, copy=False))
        self.size += piece.size
        self._bytes += self._held[-1].nbytes
        if self._bytes >= HELD and self.folder is not None:
            self._write()

    def whole(self) -> np.ndarray:
        """The array, read-only where it is mapped."""
        if self._file is None:
            return np.concatenate(self._held) if self._held else np.zeros(0, self.dtype)
        if self._held:
            self._write()
        if self._held:  # it could not be written
            return np.concatenate([np.fromfile(self._rewound(), self.dtype), *self._held])
        return np.asarray(np.memmap(self._rewound(), self.dtype, "r", shape=(self.size,)))

    def _rewound(self) -> IO[bytes]:
        assert self._file is not None
        self._file.truncate(self._written)
        self._file.seek(0)
        return self._file

    def _write(self) -> None:
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(dir=self.folder, buffering=0)  # noqa: SIM115
            self._file.seek(self._written)
            for piece in self._held:
                left = memoryview(piece.tobytes())
                while left:
                    left = left[self._file.write(left) :]
        except OSError:
            self.folder = None
            return
        self._written += self._bytes
        self._held, self._bytes = [], 0
