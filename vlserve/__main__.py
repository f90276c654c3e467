"""`python -m vlserve`, as the command `vlserve`."""

import sys

from vlserve.commands.main import main

if __name__ == "__main__":
    sys.exit(main())
