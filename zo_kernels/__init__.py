"""Perturbation, update and statistics kernels for zeroth-order optimisation.

Knows tensors, seeds and dtypes; imports torch and nothing above it.  `ops` has the public functions,
`noise` the contract that makes a direction a pure function, `backends/` their implementations.
"""

from zo_kernels.blocks import Blocks, BlockStats
from zo_kernels.dispatch import BACKENDS, backend_name, use_backend, why_unavailable
from zo_kernels.forms import Form, below, shifted, weighted
from zo_kernels.low_rank import add_product
from zo_kernels.noise import LOW_RANK, MASK, NOISE_VERSION, ROUNDING_PROBE, canonical_name, derive_seed, tensor_ids
from zo_kernels.ops import block_stats, dot_noise, perturb_, scratch, seed_tensor, update_, update_scratch_, words
from zo_kernels.ops import noise as draw_noise
from zo_kernels.parts import parts_of
from zo_kernels.replay import replay_
from zo_kernels.rounding import ulp
from zo_kernels.rules import RULES
from zo_kernels.states import update_state_

__all__ = [
    "BACKENDS",
    "LOW_RANK",
    "MASK",
    "NOISE_VERSION",
    "ROUNDING_PROBE",
    "RULES",
    "BlockStats",
    "Blocks",
    "Form",
    "add_product",
    "backend_name",
    "below",
    "block_stats",
    "canonical_name",
    "derive_seed",
    "dot_noise",
    "draw_noise",
    "parts_of",
    "perturb_",
    "replay_",
    "scratch",
    "seed_tensor",
    "shifted",
    "tensor_ids",
    "ulp",
    "update_",
    "update_state_",
    "update_scratch_",
    "use_backend",
    "weighted",
    "why_unavailable",
    "words",
]
