"""A real ACME CA for tests: the one of the demo."""

from proxy.cli.pebble import Pebble, is_installed, pebble

__all__ = ["Pebble", "is_installed", "pebble"]
