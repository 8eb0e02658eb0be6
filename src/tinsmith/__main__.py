"""`python -m tinsmith` is the `tinsmith` command."""

from tinsmith.cli import main

if __name__ == "__main__":
    main()
