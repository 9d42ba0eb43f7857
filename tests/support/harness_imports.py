"""What the fork server of the tests imports once for all party processes, also what a program imports only when needed."""

import mpc_fl.apps.runs.launcher
import mpc_fl.federation.aggregator_program
import mpc_fl.federation.hospital_program
import mpc_fl.inference.hospital_program
import mpc_fl.learning.training.noised_optimizer  # noqa: F401 - with Opacus
from mpc_fl.learning.models.architectures import architectures

architectures()  # imports torchvision
