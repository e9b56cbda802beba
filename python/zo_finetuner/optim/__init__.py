"""Methods as small ask/tell classes; one file per family, one line in the table of `create`."""

from zo_finetuner.optim.base import Direction, Method, Probe, StepContext, Update
from zo_finetuner.optim.create import METHODS, check_method, make_method
from zo_finetuner.optim.finetuner import ZOFineTuner
from zo_finetuner.optim.mezo import MeZO
from zo_finetuner.optim.self_calibrated import SelfCalibrated

__all__ = [
    "METHODS",
    "Direction",
    "MeZO",
    "Method",
    "Probe",
    "SelfCalibrated",
    "StepContext",
    "Update",
    "ZOFineTuner",
    "check_method",
    "make_method",
]
