"""Slimmable networks: one set of weights, of which a configuration uses a prefix in every layer.

``layers`` are the primitives, ``gates`` decide, ``networks`` put configurations and a gate together, and
``blocks`` are those of DS-Net. ``edgedyn/layers/ddsnet.py`` makes routed programs of them.
"""
