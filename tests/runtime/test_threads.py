import os
import signal
import threading

import pytest

from runtime.threads import JoinableThread


def test_interrupted_join_can_be_repeated():
    """Python 3.11 took the thread for a finished one: the second join returned at once."""
    released = threading.Event()
    thread = JoinableThread(target=lambda: released.wait(20))
    thread.start()
    threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        thread.join()
    thread.join(0.1)
    assert thread.is_alive() and not thread.has_returned.is_set()
    released.set()
    thread.join()
    assert not thread.is_alive()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_thread_that_raises_can_be_joined():
    thread = JoinableThread(target=lambda: int("x"))
    thread.start()
    thread.join(20)
    assert thread.has_returned.is_set() and not thread.is_alive()
