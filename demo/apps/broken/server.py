"""A program that cannot start: it looks for a setting that nobody made, says so, and ends with status 78."""

import os
import sys

if "DATABASE_URL" not in os.environ:
    print("broken: DATABASE_URL is not set, cannot start", file=sys.stderr, flush=True)
    sys.exit(78)
print("broken: somebody repaired me", flush=True)
