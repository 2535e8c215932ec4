"""`python -m plait`: the command line where no script is installed."""

from plait.cli import main

if __name__ == "__main__":
    main()
