"""What the fork server of the tests imports once for all party processes."""

import opacus  # noqa: F401

import mpc_fl.apps.runs.launcher  # noqa: F401
import mpc_fl.federation.hospital_round  # noqa: F401
import parties.aggregator  # noqa: F401
