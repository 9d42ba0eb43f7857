"""What a role imports for encrypted diagnosis: nobody waits for libraries that its part of the engine `fast` has no use for."""

from __future__ import annotations

import subprocess
import sys

import pytest

LIBRARIES = ("crypten", "onnx", "opacus", "torchvision", "scipy", "sklearn", "matplotlib", "pydicom", "PIL")
CONFIG = """
from mpc_fl.config.config import Config
values = {"task": "infer", "data": {"image_size": 16, "channels": 1}, "model": {"architecture": "small_cnn"}}
config = Config().with_values(**values, inference={"engine": "fast"})
"""
ROLES = {
    "hospital": """
import mpc_fl.inference.fast.diagnosis
from mpc_fl.inference.diagnosis import require_supported
require_supported(config)
""",
    "hospital of a standing model owner": "import mpc_fl.inference.serving.client",
    "model owner": """
import mpc_fl.inference.fast.diagnosis, mpc_fl.learning.models.model_file, parties.model_owner
from mpc_fl.inference.diagnosis import require_supported
require_supported(config)
""",
    "standing model owner": "import mpc_fl.inference.serving.server, parties.model_owner",
    "dealer": """
import parties.dealer
from mpc_fl.inference.diagnosis import dealing_of
dealing_of(config)
""",
    "standing dealer": "import mpc_fl.inference.serving.dealer_server, parties.dealer",
}


@pytest.mark.parametrize("role", ROLES)
def test_a_role_of_the_engine_fast_imports_what_it_needs(role: str) -> None:
    program = f"{CONFIG}\n{ROLES[role]}\nimport sys\nprint(*(name for name in {LIBRARIES} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


@pytest.mark.parametrize("engine", ["fast", "reference"])
def test_crypten_is_imported_when_its_engine_is_chosen(engine: str) -> None:
    program = f"{CONFIG}\nconfig = config.with_values(inference={{'engine': '{engine}'}})\n"
    program += "from mpc_fl.inference.diagnosis import require_supported\nrequire_supported(config)\n"
    program += "import sys\nprint('crypten' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(engine == "reference")
