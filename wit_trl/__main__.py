"""`python -m wit_trl`: the same as `wit-trl`."""

from .cli import main


if __name__ == "__main__":
    main()
