"""The case study: what central training, hospitals alone and federations reach on chest X-rays, at which privacy and cost.

A driver over the product's own commands; README.md says what it runs, for how long, and how to read it. Begin with `steps`.
"""
