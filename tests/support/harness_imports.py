"""What the fork server of the tests imports once for all party processes."""

import opacus  # noqa: F401

import mpc_fl.apps.runs.launcher  # noqa: F401
import mpc_fl.federation.aggregator_program  # noqa: F401
import mpc_fl.federation.hospital_program  # noqa: F401
