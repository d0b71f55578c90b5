"""The small model of the evaluation's tests."""

from tests.evaluate.conftest import float_folder as float_folder
from tests.evaluate.conftest import quantized_folder as quantized_folder
