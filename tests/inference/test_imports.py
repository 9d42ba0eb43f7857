"""What a role imports for encrypted diagnosis: nobody waits for libraries that its part of the engine `fast` has no use for."""

from __future__ import annotations

import subprocess
import sys

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


def printed(program: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_role_of_the_engine_fast_imports_what_it_needs() -> None:
    """One process plays all roles in turn: none of them may bring a library along."""
    found = f"\nprint(*(name for name in {LIBRARIES} if name in sys.modules), end=' ')\n"
    assert printed(f"import sys\n{CONFIG}" + "".join(f"{role}{found}" for role in ROLES.values())).split() == []


def test_crypten_is_imported_when_its_engine_is_chosen() -> None:
    program = f"import sys\n{CONFIG}\nfrom mpc_fl.inference.diagnosis import require_supported\n"
    for engine in ("fast", "reference"):
        program += f"require_supported(config.with_values(inference={{'engine': '{engine}'}}))\n"
        program += "print('crypten' in sys.modules)\n"
    assert printed(program).split() == ["False", "True"]
