"""A lock in memory that a device can open: the C library's spin lock.

A thread that waits for a word of memory in Python would keep Python's lock from everybody else; one that waits inside
`pthread_spin_lock`, called through ctypes, keeps it from nobody, and sees a write of the device within a microsecond.
It takes a core while it waits, so wait only while the device is about to write.
"""

from __future__ import annotations

import ctypes

from moeflow.errors import DeviceError

__all__ = ["SpinLock"]


class SpinLock:
    """At `address`, four bytes that stay where they are; closed at first.

    Raises:
        DeviceError: the C library has none (Windows).
    """

    def __init__(self, address: int):
        try:
            library = ctypes.CDLL(None)
            self._lock = library.pthread_spin_lock
            init = library.pthread_spin_init
        except (OSError, AttributeError, TypeError) as error:
            raise DeviceError(f"no spin lock to wait for the device with: {error}") from error
        self._address = ctypes.c_void_p(address)
        self._word = ctypes.c_int.from_address(address)
        init(self._address, 0)
        self.opened = self._word.value
        """What the word holds while the lock is open: 1 on x86-64, 0 elsewhere."""
        self.close()

    def close(self) -> None:
        """Close it, whatever it was; nobody may be opening it meanwhile."""
        self._word.value = self.opened
        self._lock(self._address)

    def open(self) -> None:
        """Let one waiting thread through, or the next that waits."""
        self._word.value = self.opened

    def wait(self) -> None:
        """Until it is open; closes it again."""
        self._lock(self._address)
