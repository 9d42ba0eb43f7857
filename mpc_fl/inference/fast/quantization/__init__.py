"""From a float network to an integer network with public scales: all before the protocol, at the model owner.

`calibration` is the way in: it runs `float_graph` on images, plans scales (`scales` has the rules, `scale_plan` applies them),
fills ranges (`rescaling`), rounds weights (`weight_rounding`), writes the integer network (`lowering`) and says how likely a
value leaves its range (`risk`). `emulation` computes an integer network in plaintext, bit for bit. Uses `fast.network`,
`fast.kernels` and `inference.graph`; knows no party and no link. Begin with `calibration`, then `scales`.
"""
