"""Signals that end a run after its step."""

import contextlib
import os
import signal
from types import FrameType


class GracefulInterrupt:
    """Ctrl-C, SIGTERM or SIGHUP requests a stop after the current step.

    A second Ctrl-C ends the program at once."""

    def __init__(self) -> None:
        self.requested = False
        for number in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
            # nohup ignores SIGHUP, and it stays ignored
            if number == signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self.request)

    def request(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal: request the stop, and let a second Ctrl-C end the program."""
        signal.signal(signal.SIGINT, signal.default_int_handler)
        self.requested = True
        message = f"\n{signal.Signals(number).name}: finishing the step, then saving ...\n"
        with contextlib.suppress(OSError):  # the terminal may be closed; print is not reentrant
            os.write(2, message.encode())
