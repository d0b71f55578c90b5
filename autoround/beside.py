"""Work that goes on beside other work: on a thread of its own, which ends with the process."""

import threading
from collections.abc import Callable
from concurrent.futures import Future


def beside(work: Callable[[], object]) -> Callable[[], None]:
    """Start work on a thread.

    Returns:
        A function that waits for its end, and raises what it raised.

    >>> wait = beside(lambda: 1 / 0)
    >>> wait()
    Traceback (most recent call last):
    ZeroDivisionError: division by zero
    """
    done: Future[None] = Future()

    def run() -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 it is raised where the end is waited for
            done.set_exception(error)
        else:
            done.set_result(None)

    threading.Thread(target=run, daemon=True).start()
    return done.result
