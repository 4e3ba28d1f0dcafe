"""`python server.py`: `steer serve` with the embedded demo model. Options as there."""

import sys

from steer.cli.app import app

if __name__ == "__main__":
    app(["serve", *sys.argv[1:]])
