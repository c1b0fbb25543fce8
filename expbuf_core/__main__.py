"""`python -m expbuf_core`: the same as the command `expbuf`."""

from __future__ import annotations

import sys

from expbuf_core.cli import main

if __name__ == "__main__":
    sys.exit(main())
