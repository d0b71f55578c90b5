"""Work that goes on beside other work: on a thread of its own, which ends with the process."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


def beside(work: Callable[[], T]) -> Callable[[], T]:
    """Start work on a thread.

    Returns:
        A function that waits for its end, returns what it returned, and raises what it raised.

    >>> beside(lambda: 6 * 7)()
    42

    >>> wait = beside(lambda: 1 / 0)
    >>> wait()
    Traceback (most recent call last):
    ZeroDivisionError: division by zero
    """
    done: Future[T] = Future()

    def run() -> None:
        try:
            found = work()
        except BaseException as error:  # noqa: BLE001 it is raised where the end is waited for
            done.set_exception(error)
        else:
            done.set_result(found)

    threading.Thread(target=run, daemon=True).start()
    return done.result
