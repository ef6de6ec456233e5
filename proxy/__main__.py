"""`python -m proxy` is the command `wakefront`."""

from proxy.cli.main import main

if __name__ == "__main__":
    main()
