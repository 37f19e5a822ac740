"""Which test files run beside each other where pytest-xdist runs several."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent
# Two files, so that who waits to be alone is not overtaken: nobody enters while it holds the first.
LOCKS = FOLDER.parent / ".cache"
# Set while this process has its turn, which the pytest that a test starts shares.
TAKEN = "TEST_TURN_TAKEN"
# Unit tests have short deadlines and go beside each other; servers keep all cores busy. The files
# of the engine are the shortest of the rest and end the run: both workers get to its end at once.
OTHERS = ""
ORDER = ("unit", "alone", "serve", OTHERS, "engine")


def place(item: pytest.Item) -> int:
    """Return where a test's file comes, by its folder or its mark."""
    if item.get_closest_marker("alone"):
        return ORDER.index("alone")
    folder = item.path.relative_to(FOLDER).parts[0]
    return ORDER.index(folder if folder in ORDER else OTHERS)


@contextmanager
def turn(*, alone: bool) -> Iterator[None]:
    """Take the machine, beside others or, once they have ended, alone."""
    if TAKEN in os.environ:
        yield
        return
    LOCKS.mkdir(exist_ok=True)
    with (LOCKS / "tests.door").open("w") as door, (LOCKS / "tests.room").open("w") as room:
        fcntl.flock(door, fcntl.LOCK_EX)
        fcntl.flock(room, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(door, fcntl.LOCK_UN)
        os.environ[TAKEN] = "1"
        try:
            yield
        finally:
            del os.environ[TAKEN]
