"""Launches one trial on the processes that its flags ask for. A worker starts this, as a process of its own."""

import sys

from ..cli.launch import main
from .trial import TRIAL_TYPES


if __name__ == "__main__":
    main(sys.argv[1:], "wit_trl.sweep.trial", TRIAL_TYPES)
