"""Worker processes of the tools."""

from __future__ import annotations

import os
import signal
import threading
from multiprocessing import connection, parent_process


def start_worker() -> None:
    """Ignore Ctrl-C in a worker process, and exit with the main process even if that is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    parent = parent_process()
    assert parent

    def end_with_parent() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
