"""Signals that end a run after its step, and what must be complete before it ends."""

import contextlib
import os
import signal
from collections.abc import Iterator
from types import FrameType

from checkpoints.manager import CheckpointManager


class GracefulInterrupt:
    """Ctrl-C, SIGTERM or SIGHUP requests a stop after the current step.

    A second Ctrl-C raises KeyboardInterrupt."""

    def __init__(self) -> None:
        self.requested = False
        for number in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
            # nohup ignores SIGHUP, and it stays ignored
            if number == signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self.request)

    def request(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal: request the stop, and let a second Ctrl-C interrupt the program."""
        signal.signal(signal.SIGINT, signal.default_int_handler)
        self.requested = True
        message = f"\n{signal.Signals(number).name}: finishing the step, then saving ...\n"
        with contextlib.suppress(OSError):  # the terminal may be closed; print is not reentrant
            os.write(2, message.encode())


@contextlib.contextmanager
def complete_saves(checkpoints: CheckpointManager) -> Iterator[None]:
    """Wait at the end of the block until nothing is being written.

    The caller releases the lock of the output folder afterwards. Ctrl-C in the block cancels all
    saves but the file that is being written. Ctrl-C during the wait ends the process at once, and
    with it the thread that writes."""
    try:
        yield
    except KeyboardInterrupt:
        if checkpoints.cancel():
            with contextlib.suppress(OSError):
                os.write(2, b"\ncompleting the file being written; Ctrl-C ends at once ...\n")
        raise
    finally:
        try:
            checkpoints.join()
        except KeyboardInterrupt:
            os._exit(130)
