"""Signals that end a run after its step, and the time of its steps."""

import contextlib
import os
import signal
import time
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
        """The signal handler."""
        signal.signal(signal.SIGINT, signal.default_int_handler)
        self.requested = True
        message = f"\n{signal.Signals(number).name}: finishing the step, then saving ...\n"
        with contextlib.suppress(OSError):  # the terminal may be closed; print is not reentrant
            os.write(2, message.encode())


class StepTimer:
    """Measures seconds per step. Call restart after an evaluation or a save to leave it out."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Start measuring now."""
        self.started = time.perf_counter()
        self.num_steps = 0

    def count_step(self) -> None:
        """Note that a step is done."""
        self.num_steps += 1

    def lap(self) -> float:
        """The seconds per step since the last lap or restart; measuring restarts."""
        seconds = (time.perf_counter() - self.started) / max(1, self.num_steps)
        self.restart()
        return seconds
