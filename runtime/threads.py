"""A thread that can be joined again after Ctrl-C."""

import threading
from collections.abc import Callable


class JoinableThread(threading.Thread):
    """A thread that can be joined again after Ctrl-C interrupted a join.

    Thread.join interrupted by Ctrl-C takes a running thread for a finished one (Python 3.11)."""

    def __init__(self, target: Callable[[], None], daemon: bool = False):
        super().__init__(target=target, daemon=daemon)
        self.has_returned = threading.Event()

    def run(self) -> None:
        """Call the target."""
        try:
            super().run()
        finally:
            self.has_returned.set()

    def join(self, timeout: float | None = None) -> None:
        """Wait until the thread has ended, for at most timeout seconds.

        super().join waits only for the instants after the target's return."""
        if self.has_returned.wait(timeout):
            super().join(timeout)
