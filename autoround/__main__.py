"""``python -m autoround``: the command ``auto-round``."""

import sys

from autoround.cli.main import auto_round

if __name__ == "__main__":
    sys.exit(auto_round())
