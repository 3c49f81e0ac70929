"""`python -m wit_trl.cli`: the same as `wit-trl`."""

from . import main


if __name__ == "__main__":
    main()
