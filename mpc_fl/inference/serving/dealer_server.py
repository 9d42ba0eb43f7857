"""The dealer that stays up: it deals in every session of a hospital with the model owner, and knows no image and no weight."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from mpc_fl.audit.receipt_file import ReceiptFile
from mpc_fl.config.config import Config
from mpc_fl.crypto.certificates import Identity
from mpc_fl.inference.fast.messages import network_digest
from mpc_fl.inference.fast.preprocessing.dealer import deal
from mpc_fl.inference.serving.front import Admission, ServiceFront
from mpc_fl.inference.serving.quota import SessionRate
from mpc_fl.inference.serving.receipt_exchange import DealerReceipts
from mpc_fl.inference.serving.service_links import require_servable, session_links, standing_party
from mpc_fl.inference.serving.service_records import open_records
from mpc_fl.inference.serving.visits import Visit
from mpc_fl.links.frames import Observer
from mpc_fl.links.handshake import Agreement
from mpc_fl.links.links import Links
from mpc_fl.links.network import NetworkLinks
from mpc_fl.links.party_links import site_directory
from mpc_fl.progress import Notify
from mpc_fl.roles import DEALER, MODEL_OWNER


class DealerService:
    """The dealer's `Service`: sessions have nothing in common but the file, in `directory`, of what it signed."""

    def __init__(self, config: Config, identity: Identity, directory: Path, observer: Observer | None = None) -> None:
        self._config, self._identity, self._observer = config, identity, observer
        self._receipts = ReceiptFile(directory, identity)

    def make_links(self, visit: Visit, agreement: Agreement) -> NetworkLinks:
        """Links to the hospital and the model owner."""
        deadline = self._config.runtime.receive_timeout
        return session_links(self._identity, self._config, visit.hospital, agreement, deadline, self._observer)

    def serve(self, links: Links, visit: Visit) -> None:
        """As in a single diagnosis; it signs how many batches it makes."""
        receipts = DealerReceipts(links, visit.hospital, self._identity, self._receipts)
        deal(
            links,
            visit.hospital,
            MODEL_OWNER,
            lambda network, records: receipts.made(network_digest(network), records),
        )


def serve_correlations(
    config: Config, notify: Notify, until: Callable[[], None], observer: Observer | None = None
) -> None:
    """The dealer: deal in every session of a hospital with the model owner until `until` returns or raises."""
    require_servable(config)
    party, out, serving = standing_party(config, DEALER), site_directory(config), config.serving
    with open_records(out, DEALER) as records:
        rate = SessionRate(records, serving.sessions_per_minute)
        admission = Admission(frozenset({MODEL_OWNER}), serving.sessions, rate)
        with ServiceFront(party, admission, DealerService(config, party.identity, out, observer)):
            notify("serving", 1, 1)
            until()
