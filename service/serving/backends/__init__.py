"""Ways to execute a program: one small interface, several engines behind it."""

from service.serving.backends.base import Backend, Description, Precision, Prepared
from service.serving.backends.choices import Choices
from service.serving.backends.lost import find_lost
from service.serving.backends.parts import BatchPart, Levels
from service.serving.backends.registry import backend_named, backend_names, can_quantise
from service.serving.backends.rows import RowSpec, powers_of_two, random_rows

__all__ = [
    "Backend",
    "BatchPart",
    "Choices",
    "Description",
    "Levels",
    "Precision",
    "Prepared",
    "RowSpec",
    "backend_named",
    "backend_names",
    "can_quantise",
    "find_lost",
    "powers_of_two",
    "random_rows",
]
