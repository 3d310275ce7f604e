"""Small weights that ship with the package, each under the digest of the bytes it must have."""

from __future__ import annotations

import hashlib
from pathlib import Path

from fedkit.errors import FedkitError

SHA256 = {
    "vit_8x8.safetensors": "6d87e88180c51c1d977227341e70978863a12e817f2355fe6e7f6c40b4bd7411",
}
"""File name to digest. `examples/quickstart/pretrain.py` writes the weights and prints what belongs here."""


def asset_path(name: str) -> Path:
    """Return where asset `name` lies, after checking that its bytes are the published ones.

    A client and a server that start from different frozen weights would average adapters that mean
    nothing to each other, and no later step would notice.

    Raises
    ------
    FedkitError
        If there is no such asset, its file is missing, or its SHA-256 digest differs.
    """
    if name not in SHA256:
        raise FedkitError(f"unknown asset {name!r}: expected one of {sorted(SHA256)}.")
    path = Path(__file__).with_name(name)
    if not path.is_file():
        raise FedkitError(f"asset {name!r} is missing (expected at {path}). Reinstall fedkit.")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != SHA256[name]:
        raise FedkitError(f"asset {name!r}: expected SHA-256 {SHA256[name]}, got {digest}. Reinstall fedkit.")
    return path
