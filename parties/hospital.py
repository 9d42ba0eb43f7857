"""A hospital: trains on its own patients and shares masked updates, or asks for an encrypted diagnosis of its images.

Training is `mpc_fl.federation.hospital_program` under an aggregator and `mpc_fl.federation.peer_program` without one, diagnosis
`mpc_fl.inference.hospital_program`: each says where an update, or an image, is masked. Each is imported only when it is needed:
it takes seconds, and brings in what the other has no use for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mpc_fl.roles import hospital_name

if TYPE_CHECKING:
    from mpc_fl.config.config import Config
    from mpc_fl.links.frames import Observer
    from mpc_fl.progress import Notify


def run(config: Config, rank: int, notify: Notify, observer: Observer | None = None) -> None:
    """Take part in the configured task as hospital `rank`."""
    if config.task == "train" and config.among_peers:
        from mpc_fl.federation import peer_program

        peer_program.run(config, rank, notify, observer)
        return

    if config.task == "train":
        from mpc_fl.federation import hospital_program as training

        training.run(config, rank, notify, observer)
        return

    from mpc_fl.inference import hospital_program as diagnosis

    if config.task == "serve" and config.inference.fill:
        diagnosis.fill_from_server(config, hospital_name(rank), notify, observer)
    elif config.task == "serve":
        diagnosis.ask(config, hospital_name(rank), notify, observer)
    elif config.inference.fill:
        diagnosis.fill(config, notify, observer)
    else:
        diagnosis.diagnose(config, notify, observer)
