"""``forebay serve``: configuration in, the service run, exit code out."""

from __future__ import annotations

import argparse
import sys

from forebay.daemon import logging as daemon_logging
from forebay.daemon.cli import Exit
from forebay.daemon.cli_config import complain, load_from
from forebay.daemon.config import Config, ConfigError, environment
from forebay.daemon.configfile import Loaded
from forebay.kvstore.errors import Busy, ForebayError


class _Reloader:
    """Reads the same file and flags again, keeping the last that was right."""

    def __init__(self, loaded: Loaded) -> None:
        self._loaded = loaded

    def __call__(self) -> Config:
        """Raises ConfigError; the running configuration then stays."""
        self._loaded = self._loaded.reload()
        return self._loaded.config


def serve(arguments: argparse.Namespace) -> int:
    """Run the daemon until SIGTERM. A wrong configuration is exit 2, another daemon in the same place exit 5."""
    env = environment()
    try:
        loaded = load_from(arguments, env)
    except ConfigError as error:
        return complain(error.problems)
    from forebay.daemon import service

    daemon_logging.setup(loaded.config.runtime.log_level, loaded.config.runtime.log_format)
    try:
        service.run(
            loaded.config,
            notify_socket=env.notify_socket,
            watchdog_usec=env.watchdog_usec,
            reload=_Reloader(loaded),
        )
    except Busy as error:
        print(f"forebay: {error}", file=sys.stderr)
        return Exit.TAKEN
    except (ForebayError, OSError) as error:
        print(f"forebay: cannot start: {error}", file=sys.stderr)
        return Exit.REFUSED
    return Exit.OK
