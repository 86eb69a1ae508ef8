# SPDX-License-Identifier: Apache-2.0
"""Unpack a Triton cache that tools/precompile_triton.py has filled on another machine.

    TRITON_CACHE_DIR=$(python tools/triton_cache.py FOLDER/triton-cache-sm90.json) && export TRITON_CACHE_DIR

Prints the cache's folder. If Triton would not find its entries, prints the reason on standard error, unpacks nothing
and exits with 1. Requires only Triton: neither torch nor this package is imported.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import lzma
import sys
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

FORMAT = "mustdrop-triton-cache-1"
KEPT = (".cubin", ".json")
SOURCES = Path(__file__).resolve().parents[1] / "mustdrop_kernels" / "backends" / "triton"


def installed(arch: int) -> dict[str, Any]:
    """Inputs of the cache keys for an NVIDIA GPU other than the kernels: Triton and its libraries, ptxas, variables."""
    import triton
    from triton._C.libtriton import get_cache_invalidating_env_vars
    from triton.backends import backends
    from triton.backends.compiler import GPUTarget

    try:
        from triton.runtime.cache import triton_key
    except ImportError:  # before 3.5
        from triton.compiler.compiler import triton_key
    return {
        "triton": triton.__version__,
        "python": f"cp{sys.version_info.major}{sys.version_info.minor}",
        "triton_key": hashlib.sha256(triton_key().encode()).hexdigest(),
        "assembler": " ".join(backends["nvidia"].compiler(GPUTarget("cuda", arch, 32)).hash().split()),
        "variables": dict(get_cache_invalidating_env_vars()),
    }


def sources() -> str:
    """Digest of the files with the kernels."""
    digest = hashlib.sha256()
    for file in sorted(SOURCES.glob("*.py")):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def pack(cache: Path, entries: Iterable[str], archive: Path) -> None:
    """Write entries of a cache into an archive: the binaries and descriptions that a launch reads."""
    files = [file for entry in entries for file in (cache / entry).iterdir() if file.suffix in KEPT]
    with tarfile.open(archive, "w:xz", preset=9) as tar:
        # Similar files are adjacent, for compression; file lists come last, so that a truncated archive gives no list
        # of missing files.
        for file in sorted(files, key=lambda file: (_is_list(file), file.name, file)):
            contents = _without_the_rest(file) if _is_list(file) else file.read_bytes()
            entry = tarfile.TarInfo(str(file.relative_to(cache)))
            entry.size = len(contents)
            tar.addfile(entry, io.BytesIO(contents))


def _is_list(file: Path) -> bool:
    """True for the index of an entry's files, which holds absolute paths."""
    return file.name.startswith("__grp__")


def _without_the_rest(file: Path) -> bytes:
    """The index restricted to the files that are kept: newer versions of Triton require all listed files."""
    paths = json.loads(file.read_text())["child_paths"]
    return json.dumps({"child_paths": {name: at for name, at in paths.items() if Path(name).suffix in KEPT}}).encode()


def read(document: Path) -> dict[str, Any]:
    """Read the description of an archive.

    Raises:
        ValueError: the file is not a description.
        OSError: it cannot be read.
    """
    found = json.loads(document.read_text())
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ValueError(f"{document} does not describe a cache of tools/precompile_triton.py ({FORMAT})")
    return found


def why_not(document: dict[str, Any]) -> str | None:
    """The reason that Triton would find no entry on this machine, or None."""
    for name, here in installed(document["arch"]).items():
        if document[name] != here:
            return f"{name}: the cache was filled with {document[name]!r}, here is {here!r}"
    return None


def unpack(document: dict[str, Any], folder: Path) -> Path:
    """Unpack the entries to their original path, since their descriptions hold absolute paths."""
    cache = Path(document["cache"])
    cache.mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / document["archive"], "r:xz") as tar:
        tar.extractall(cache, filter="data")
    return cache


def main() -> int:
    """Compare, unpack, print the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("document", type=Path, help="the JSON file beside the archive")
    options = parser.parse_args()
    try:
        document = read(options.document)
        reason = why_not(document)
        if reason is None:
            print(unpack(document, options.document.parent))
    except (OSError, EOFError, ValueError, KeyError, ImportError, lzma.LZMAError, tarfile.TarError) as error:
        reason = f"{type(error).__name__}: {error}"
    if reason is not None:
        print(f"the Triton cache is not used: {reason}", file=sys.stderr)
        return 1
    if document["sources"] != sources():
        print("the kernels' files have changed since the cache was filled: some are compiled again", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
