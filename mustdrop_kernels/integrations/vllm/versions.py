# SPDX-License-Identifier: Apache-2.0
"""Supported versions of vLLM: those that the tests have run with, since much of what the plug-in uses is private."""

from __future__ import annotations

FIRST, END = (0, 32), (0, 34)
"""The first supported minor version, and the first that is not supported any more."""

_RANGE = f">={FIRST[0]}.{FIRST[1]},<{END[0]}.{END[1]}"


def check() -> None:
    """Raises ``ValueError`` in a vLLM that is not supported; a source build without a number gets a warning."""
    from vllm.logger import init_logger
    from vllm.version import __version__

    if (reason := problem(__version__)) is not None:
        raise ValueError(reason)
    if _minor(__version__) is None:
        text = "mustdrop: vLLM %s has no release number; the plug-in supports vllm%s"
        init_logger("vllm.mustdrop").warning_once(text, __version__, _RANGE)


def problem(version: str) -> str | None:
    """The reason why a version of vLLM is not supported, or None."""
    minor = _minor(version)
    if minor is None or FIRST <= minor < END:
        return None
    return f"mustdrop: vLLM {version} is not supported: install vllm{_RANGE}, which the plug-in is tested with"


def _minor(version: str) -> tuple[int, ...] | None:
    """Major and minor number; None for source builds without a release tag, "dev" or 0.1.dev1+g4ba787ec9."""
    from packaging.version import InvalidVersion, Version  # a dependency of vLLM

    try:
        found = Version(version)
    except InvalidVersion:
        return None
    minor = (*found.release, 0)[:2]
    return None if found.is_devrelease and minor < (0, 2) else minor
