"""`python -m peft_s2a`: the command line."""

import sys

from .integrations.command_line import main

if __name__ == "__main__":
    sys.exit(main())
