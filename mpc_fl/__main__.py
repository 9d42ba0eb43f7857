"""`python -m mpc_fl`: the command line where the script `mpc-fl` is not on the path."""

from mpc_fl.apps.cli.main import main

if __name__ == "__main__":
    main()
