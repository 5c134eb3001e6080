"""``python -m experiments``: the command line of ``runner``."""

import sys

from runner import command

if __name__ == "__main__":
    sys.exit(command.main(sys.argv[1:]))
