"""The protocol of the engine `fast`, from an image to its opened result.

`hospital_session` states the protocol and is the hospital's side; `owner_session` is the model owner's; `evaluation` walks the
network on shares and masks what leaves; `comparison` is the one interactive gate (`compiled_steps`: its steps in C);
`shared_steps` is what both sides do with their results. Uses `fast.preprocessing`, `fast.kernels`, `links`, and
`sharing.opening` as the only way out of the secret domain. Begin with `hospital_session`.
"""
