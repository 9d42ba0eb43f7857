"""Links between parties: typed messages to named peers, a deadline on every wait, no secret in the clear on the way.

Begin with `links` (the face that protocols use) and `mailboxes` (where they wait, and who is lost). Two kinds carry the
frames: `network` over `streams` of TLS (`connections` makes the links with `handshake`, `outgoing` sends, `relay` serves
parties that can only dial out), and `in_memory` between threads of one process, for tests of protocols. `party_links`
makes the links of a party from its configuration.

May use `config`, `crypto` and the ground (`errors`, `files`, `roles`). It moves bytes and does no arithmetic on them; what
a message means is the matter of the protocols above.
"""
