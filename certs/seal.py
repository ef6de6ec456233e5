"""Private keys at rest are sealed: AES-256-GCM under a secret of the node, bound to the name they are stored under."""

from __future__ import annotations

import os
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from certs.errors import CertificateError, SealBrokenError

SECRET_BYTES = 32
_NONCE_BYTES = 12


class Seal:
    """Seals and opens. Random nonces under one key are safe for 2^32 values, far beyond any number of certificates."""

    def __init__(self, secret: bytes) -> None:
        if len(secret) != SECRET_BYTES:
            raise CertificateError(f"the secret has {len(secret)} bytes, not {SECRET_BYTES}")
        self._cipher = AESGCM(secret)

    def close(self, plain: bytes, name: str) -> bytes:
        nonce = os.urandom(_NONCE_BYTES)
        return nonce + self._cipher.encrypt(nonce, plain, name.encode())

    def open(self, sealed: bytes, name: str) -> bytes:
        """The plain value.

        Raises SealBrokenError if it was not sealed with this secret under this name.
        """
        if len(sealed) < _NONCE_BYTES:
            raise SealBrokenError(f"{name}: {len(sealed)} bytes are too few for a sealed value")
        try:
            return self._cipher.decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], name.encode())
        except InvalidTag as error:
            raise SealBrokenError(f"{name}: sealed with another secret or under another name, or altered") from error


def load_or_make_secret(path: Path) -> bytes:
    """The node's secret, made on first use. Of several processes that come first at once, one makes it.

    Raises CertificateError if the file exists and is not a secret, or if others may read it.
    """
    path = Path(path)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}")
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(os.urandom(SECRET_BYTES))
                file.flush()
                os.fsync(file.fileno())
            try:
                os.link(temporary, path)  # fails where a rename would overwrite
            except FileExistsError:
                pass
        finally:
            os.unlink(temporary)
    if path.stat().st_mode & 0o077:
        raise CertificateError(f"{path}: others may read the secret; expected mode 0600")
    secret = path.read_bytes()
    if len(secret) != SECRET_BYTES:
        raise CertificateError(f"{path}: expected {SECRET_BYTES} bytes, found {len(secret)}")
    return secret
