"""The start of a server on the terminal: what starts and where, then only what a person waits for."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from kt_kernel.cli import server_log
from kt_kernel.cli.exposure import exposure_warning
from kt_kernel.cli.machine import server_environment
from kt_kernel.cli.server_key import has_key
from kt_kernel.cli.server_url import base_url
from kt_kernel.cli.supervise import run_until_stopped
from kt_kernel.planning.user_options import last_value

log = logging.getLogger(__name__)


def run_with_banner(name: str, command: list[str], key: Mapping[str, str]) -> int:
    """Run the server `command` of the model `name` until it ends or is stopped; returns the exit status.

    `key`: what gives the server its key, where an option did.
    """
    environment = {**server_environment(), **key}
    host, port = last_value(command, "--host"), last_value(command, "--port")
    log.info(
        "starting %s: method %s, %s threads",
        name,
        last_value(command, "--kt-method"),
        last_value(command, "--kt-cpuinfer"),
    )
    url = base_url(host or "127.0.0.1", port or "unknown")
    log.info("%s/v1 answers when it is ready; Ctrl-C stops it", url)
    log.info("%s/kt shows it in a browser", url)
    warning = exposure_warning(host, has_key(environment))
    if warning is not None:
        log.warning("warning: %s", warning)
    if not server_log.wants_file():
        return run_until_stopped(command, environment)
    return _run_with_log(command, environment, port or "unknown")


def _run_with_log(command: list[str], environment: dict[str, str], port: str) -> int:
    try:
        path, output = server_log.new_log(port)
    except OSError as error:
        log.warning("warning: no log file, so the log comes here: %s", error)
        return run_until_stopped(command, environment)
    log.info("log: %s", path)
    with output:
        follower = server_log.Follower(path, lambda line: log.info("%s", line))
        try:
            status = run_until_stopped(command, environment, output)
        finally:
            follower.close()
    if status != 0:
        log.error("the server ended with status %d; the end of %s:", status, path)
        for line in server_log.last_lines(path):
            log.error("  %s", line)
    return status
