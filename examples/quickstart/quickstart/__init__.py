"""Quickstart: ten clients fine-tune one small vision transformer on handwritten digits."""
