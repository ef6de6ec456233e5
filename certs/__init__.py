"""Certificates, from a name to chain and key. Knows nothing of the proxy that shows them.

Of a public CA, by ACME (RFC 8555), a certificate comes to be like this:

    keeper      each name has a record (`domain`) that says when to look at it next
    budget      may the CA be asked now? Ours are below its own limits
    order       the steps of one order, each journalled in the store before it acts
    issuer      each step's request to the CA, and its answer read
    challenges  what the CA is shown; showing it is the caller's (`Presenter`), in DNS by `dns_hooks`
    renewal     when it is due, by the CA's word (ARI) or its life; when what failed is tried again

What DNS says of a name, and what is wrong with that: `resolver` looks, `diagnosis` judges. A certificate that somebody
brings is judged by `custom`. All of this lies in one file of sealed values with revisions (`store`).

For names that no public CA can know, and for development, there is an authority of our own (`InternalCA`):
`CertificateManager.get(name)` looks in memory, then in a `Storage`, then asks it, once however many ask. Its storage is
a folder of files (`SealedFolder`) that hold nothing readable without the node's secret (`load_or_make_secret`).

The nodes of a fleet know each other by certificates of an authority that they share (`cluster`), over TLS that asks
both ends for one (`node_tls`).

Processes that only show certificates read them, and the challenges, from one file (`PackReader`) that the issuing
process appends to (`PackWriter`); they need no one else alive for that.

Files under a node's data folder: `secret.key`, `certs/store.db`, `certs/ca.pem` (public), `certs/internal/root.sealed`,
`certs/leaf/<name>.sealed`, `certs/cluster/*.sealed`.
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
