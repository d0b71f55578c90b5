"""What glibc keeps of memory that was freed."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="glibc's settings")

# The end of the heap before and after a piece of 20 MB is taken for the second time.
PROGRAM = """
import ctypes
from autoround.cli.session import session
libc = ctypes.CDLL(None)
libc.malloc.restype = libc.sbrk.restype = ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]
{call}
libc.free(libc.malloc(20_000_000))
before = libc.sbrk(0)
libc.malloc(20_000_000)
print(libc.sbrk(0) - before)
"""


@pytest.mark.parametrize(("call", "in_heap"), [("with session([]): pass", False), ("", True)])
def test_commands_keep_large_pieces_out_of_the_heap(call: str, in_heap: bool) -> None:
    command = [sys.executable, "-c", PROGRAM.format(call=call)]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (int(found.stdout) > 10_000_000) is in_heap
