"""Methods as small ask/tell classes; one file per family, one line in the table."""

from zo_finetuner.optim.base import Direction, Method, Probe, StepContext, Update
from zo_finetuner.optim.finetuner import ZOFineTuner
from zo_finetuner.optim.mezo import MeZO

METHODS = {method.name: method for method in (MeZO, ZOFineTuner)}

__all__ = ["METHODS", "Direction", "MeZO", "Method", "Probe", "StepContext", "Update", "ZOFineTuner"]
