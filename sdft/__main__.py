"""`python -m sdft`: see `sdft.cli`."""

import sys

from sdft.cli import main

if __name__ == "__main__":
    sys.exit(main())
