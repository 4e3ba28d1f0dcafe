"""`python server.py`: `steer serve` with the embedded demo model. Options as there."""

import sys

from steer.cli import main

if __name__ == "__main__":
    main(["serve", *sys.argv[1:]])
