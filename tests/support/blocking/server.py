"""Control as it is."""

from proxy.server import run

__all__ = ["run"]
