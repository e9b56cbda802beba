"""zo-finetuner: fine-tune language models with forward passes only.

    from zo_finetuner import create_zo_optimizer
    optimizer = create_zo_optimizer(model, "mezo", lr=1e-6)
    loss = optimizer.step(lambda: model(**batch).loss)

`engine.py` has one step; `optim/` the methods; `hf.py` the Trainer; `zo --help` the command line.
"""

from zo_finetuner.engine import Engine
from zo_finetuner.errors import InputError
from zo_finetuner.optimizer import ZOOptimizer, create_zo_optimizer

__version__ = "0.1.0"

__all__ = ["Engine", "InputError", "ZOOptimizer", "create_zo_optimizer"]
