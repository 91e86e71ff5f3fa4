"""Mixture of experts with a knowledge graph on the device."""

__version__ = "0.1.0"
