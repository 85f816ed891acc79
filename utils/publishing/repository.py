# SPDX-License-Identifier: Apache-2.0
"""Where the code that trained a student can be had."""

import ipaddress
import subprocess
from pathlib import Path
from urllib.parse import urlsplit

from utils.command_line import ROOT

NAME = "lift-and-place"  # what pyproject.toml calls it; a link where this clone has one


def repository_url(root: Path = ROOT) -> str | None:
    """The web address that `root` was cloned from, without user, password and query. None without git or a clone, and
    where the address is none of the public web: a folder, ssh's, or a host of a local network."""
    command = ["git", "-C", str(root), "remote", "get-url", "origin"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
        found = urlsplit(done.stdout.strip())
        host, port = found.hostname or "", found.port
    except (OSError, subprocess.TimeoutExpired, ValueError):
        return None
    if done.returncode or found.scheme not in ("http", "https") or not _is_public(host):
        return None
    place = host if port is None else f"{host}:{port}"
    return f"{found.scheme}://{place}{found.path.removesuffix('.git')}"


def _is_public(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_global
    except ValueError:  # a name
        return "." in host and not host.endswith((".local", ".internal", ".lan"))
