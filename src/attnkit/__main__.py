"""`python -m attnkit`: the command line where no script is installed."""

from attnkit.cli import main

if __name__ == "__main__":
    main()
