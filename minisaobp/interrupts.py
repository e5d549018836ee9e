"""Ctrl-C that lets what is under way come to its end."""

import contextlib
import signal
import threading


@contextlib.contextmanager
def interrupts():
    """A function that says whether Ctrl-C was pressed; pressed once more, it interrupts as it does elsewhere."""
    pressed = []
    if threading.current_thread() is not threading.main_thread():  # signals are the main thread's
        yield lambda: False
        return

    def press(number, frame):
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)

    before = signal.signal(signal.SIGINT, press)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)
