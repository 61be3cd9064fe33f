"""The project's models."""

from nets.encoder import Decoder, Encoder

__all__ = ["Decoder", "Encoder"]
