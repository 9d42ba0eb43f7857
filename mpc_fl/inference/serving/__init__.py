"""Model owner and dealer that stay up, and the hospitals that come and go. Engine `fast` only.

`client` is a hospital's part; `server` is the model owner's and `dealer_server` the dealer's, both behind a `front`: one
address that admits a session per hospital. Before each batch the model owner's `gate` waits for a turn (`turns`) and charges a
quota (`quota`). Both sides sign a receipt of it (`receipt_exchange`). `visits` names sessions, `service_links` connects them,
`stopping` waits for the end. Uses `inference.diagnosis`, `inference.fast`, `links` and `audit`. Begin with `client`, then
`server`.
"""
