"""`python -m mpc_fl`: the command line where the script `mpc-fl` is not on the path."""

if __name__ == "__main__":  # processes that are started from here import this module again, and need nothing of it
    from mpc_fl.apps.cli.main import main

    main()
