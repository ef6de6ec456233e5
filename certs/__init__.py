"""Certificates, from a name to chain and key. Knows nothing of the proxy that shows them.

A certificate comes to be like this. `CertificateManager.get(name)` looks in memory, then in a `Storage`, then asks an
`Issuer`, once however many ask; issuing runs in a thread. The issuer is our own authority (`InternalCA`), made on first
use; the storage is a folder of files (`SealedFolder`) that hold nothing readable without the node's secret
(`load_or_make_secret`). Two thirds through its life a certificate is issued anew; should that fail, the old one does
until it expires.

Processes that only show certificates read them from one file (`PackReader`) that the issuing process appends to
(`PackWriter`); they need no one else alive for that.

Files under a node's data folder: `secret.key`, `certs/ca.pem` (public), `certs/internal/root.sealed`,
`certs/leaf/<name>.sealed`.
"""

from certs.certificate import Certificate
from certs.errors import CertificateError, IssuanceFailedError, NameRefusedError, PackInUseError, SealBrokenError
from certs.internal import InternalCA
from certs.manager import CertificateManager, Issuer
from certs.pack import PackReader, PackWriter
from certs.seal import Seal, load_or_make_secret
from certs.storage import SealedFolder, Storage

__all__ = [
    "Certificate",
    "CertificateError",
    "CertificateManager",
    "InternalCA",
    "IssuanceFailedError",
    "Issuer",
    "NameRefusedError",
    "PackInUseError",
    "PackReader",
    "PackWriter",
    "Seal",
    "SealBrokenError",
    "SealedFolder",
    "Storage",
    "load_or_make_secret",
]
