"""`python -m wit_trl`: the same as `wit-trl`."""

import os
import sys


if __name__ == "__main__":
    # Else modules of the working folder would stand for others of their name, such as `datasets`, or `pathlib`
    if sys.path[0] == os.getcwd() and not sys.flags.safe_path:  # noqa: PTH109
        del sys.path[0]
    from .cli import main

    main()
