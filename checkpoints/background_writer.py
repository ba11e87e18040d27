"""Writes files in a background thread, and retries what could not be written."""

import os
import time
from collections.abc import Callable

from runtime.threads import JoinableThread

RETRY_SECONDS = 30.0  # between attempts after a failed write


class BackgroundWriter:
    """Runs write jobs one after another in a thread.

    A job that raises OSError (no space, no permission, a missing folder) stays pending and is
    retried; it does not stop the run. Any other exception is raised in the calling thread."""

    def __init__(self, retries_alone: bool = True):
        """retries_alone: retry between saves. False where several processes write together."""
        self.retries_alone = retries_alone
        self.pending: dict[str, Callable[[], None]] = {}  # path -> the job that writes it
        self.thread: JoinableThread | None = None  # the latest that was started
        self.is_cancelled = False
        self.failure: OSError | None = None  # of the last attempt
        self.error: Exception | None = None  # one that a retry cannot mend
        self.last_attempt = 0.0  # time.monotonic()
        self.messages: list[str] = []  # for the user, not yet polled

    def submit(self, jobs: dict[str, Callable[[], None]]) -> None:
        """Start writing; a new job replaces a pending one for the same path.

        Waits for the jobs that run. Raises the error of a job that cannot be retried."""
        self.wait_or_raise()
        self.pending |= jobs
        self._start()

    def _start(self) -> None:
        thread = JoinableThread(target=self._write_pending)
        thread.start()  # raises RuntimeError if the system allows no more threads
        self.thread = thread

    @property
    def is_idle(self) -> bool:
        """Whether no job runs."""
        return self.thread is None or self.thread.has_returned.is_set()

    def _write_pending(self) -> None:
        was_failing = self.failure is not None
        self.failure = None
        for path, job in list(self.pending.items()):
            if self.is_cancelled:
                return
            try:
                if self.retries_alone:
                    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
                job()
                del self.pending[path]
            except OSError as error:  # the other jobs may succeed
                error.__cause__ = None
                self.failure = self.failure or error.with_traceback(None)  # frames hold tensors
            except Exception as error:
                self.error = error
        if self.failure and not was_failing:
            reason = describe_error(self.failure)
            self.messages.append(f"{reason}; training continues, the save is retried")
        elif was_failing and not self.failure:
            self.messages.append("saving works again")
        self.last_attempt = time.monotonic()

    def join(self) -> None:
        """Wait until no job runs and the thread has ended."""
        if self.thread:
            self.thread.join()

    def cancel(self) -> None:
        """Start no further job. The one that runs is completed; join waits for it."""
        self.is_cancelled = True

    def wait_or_raise(self) -> None:
        """Wait until no job runs. Raises the error of a job that cannot be retried."""
        self.join()
        if self.error:
            self.pending.clear()
            raise self.error

    def poll(self) -> list[str]:
        """The messages since the last call; starts a retry when it is due.

        Raises as wait_or_raise."""
        if self.is_idle:
            self.wait_or_raise()
            is_due = time.monotonic() - self.last_attempt > RETRY_SECONDS
            if self.failure and self.retries_alone and is_due:
                self._start()
        messages = self.messages
        self.messages = []
        return messages

    def flush(self) -> None:
        """Write the pending jobs. Raises ValueError if that fails."""
        self.wait_or_raise()
        if self.failure:
            self._start()
            self.wait_or_raise()
        if self.failure:
            reason = describe_error(self.failure)
            paths = ", ".join(self.pending)
            raise ValueError(f"{reason}; not written: {paths}") from self.failure


def describe_error(error: OSError | ValueError) -> str:
    """One line for the user: the file and the system's reason, or the error's text."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error)
