"""The engine `fast`: convolutional networks as integers modulo 2^32, comparisons by one-time tables, a dealer made ahead.

`network` and `layers` say what is computed: the contract between all parts. In order of a model's life:
  quantization    a float network becomes an integer network with public scales and the owner's weights
  preprocessing   what an evaluation uses up, made by the dealer before an image is there, and kept in pools
  kernels         arithmetic on one party's share: convolutions modulo 2^32, bits side by side, pooling
  online          the protocol itself: sessions of hospital and model owner, evaluation on shares, comparison
`diagnosis` puts them together as a configuration asks; `messages` holds the words that the parties say. Nothing here needs
CrypTen. Begin with the docstrings of `network` and `online.hospital_session`.
"""
