"""Ways to execute a program: one small interface, several engines behind it."""

from service.serving.backends.base import Backend, Description, Precision, Prepared

__all__ = ["Backend", "Description", "Precision", "Prepared"]
