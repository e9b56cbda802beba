"""Methods as small ask/tell classes; one file per family, one line in the table of `create`."""

from zo_finetuner.optim.base import Combination, Direction, Method, Probe, Slope, StepContext, Update
from zo_finetuner.optim.composed import Composed
from zo_finetuner.optim.create import METHODS, PRESETS, check_method, make_method
from zo_finetuner.optim.finetuner import Learned, ZOFineTuner
from zo_finetuner.optim.mezo import MeZO
from zo_finetuner.optim.self_calibrated import SelfCalibrated

__all__ = [
    "METHODS",
    "PRESETS",
    "Combination",
    "Composed",
    "Direction",
    "Learned",
    "MeZO",
    "Method",
    "Probe",
    "SelfCalibrated",
    "Slope",
    "StepContext",
    "Update",
    "ZOFineTuner",
    "check_method",
    "make_method",
]
