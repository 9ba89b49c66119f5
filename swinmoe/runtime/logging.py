"""One voice to the user: the main process speaks, the others report problems only."""

from __future__ import annotations

import logging
from functools import cache

from rich.console import Console
from rich.logging import RichHandler

from swinmoe.runtime.processes import is_main_process, launched_rank


@cache
def get_console() -> Console:
    """The console that messages and progress bars share, so that they do not overwrite each other; on stderr."""
    return Console(stderr=True)


class _OneVoice(logging.Filter):
    """Drops what is below an error on all ranks but the main one, and names the rank of what is left."""

    def filter(self, record: logging.LogRecord) -> bool:
        # Asked at every message: the process group may start after the logger.
        if is_main_process():
            return True
        if record.levelno < logging.ERROR:
            return False
        record.msg = f"[rank {launched_rank()}] {record.getMessage()}"
        record.args = ()
        return True


def get_logger(name: str = "swinmoe") -> logging.Logger:
    """The package's logger, at level INFO unless set otherwise; repeated calls return the same one."""
    package = logging.getLogger("swinmoe")
    if not package.handlers:
        handler = RichHandler(console=get_console(), show_path=False, log_time_format="%H:%M:%S")
        handler.addFilter(_OneVoice())
        package.addHandler(handler)
        package.propagate = False
        if package.level == logging.NOTSET:
            package.setLevel(logging.INFO)
    return logging.getLogger(name)
