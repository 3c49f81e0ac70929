"""The launcher of one trial, a process that a worker starts: it launches as many processes as the flags ask for."""

import sys

from ..cli.launch import main
from .trial import TRIAL_TYPES


if __name__ == "__main__":
    main(sys.argv[1:], "wit_trl.sweep.trial", TRIAL_TYPES)
