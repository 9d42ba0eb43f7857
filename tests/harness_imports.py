"""What the fork server of the tests imports once for all party processes."""

import opacus  # noqa: F401

import mpc_fl.federation  # noqa: F401
import mpc_fl.launcher  # noqa: F401
import parties.aggregator  # noqa: F401
