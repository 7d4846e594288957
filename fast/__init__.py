"""Faster or smaller versions of the plain parts, applied from outside; without this folder every script still runs.

    keep_freed_memory()                              # before the first tensor
    speed_up_training(model)                         # the same losses and gradients in less time and memory
    compile_training(model, trial_step, any_failed)  # after that: torch.compile, block by block or in one piece
    speed_up_optimizers(optimizers)                  # Muon's updates in less time
    speed_up_generation(model, quantize="int8")      # a model that only generates from then on
    give_back_freed_memory()                         # after loading: return the memory that only loading needed

Scripts get this package from `common.speedups.load_speedups`. No other module imports it or knows its parts. Replaced
modules keep their parameters and the parameters' names, so checkpoints are the same with this package and without it.
"""

from fast.allocator import give_back_freed_memory, keep_freed_memory
from fast.generation import speed_up_generation
from fast.muon_kernel import speed_up_optimizers
from fast.tied_head import LOSS_CHUNK_ROWS
from fast.training import compile_training, speed_up_training

__all__ = [
    "LOSS_CHUNK_ROWS",
    "compile_training",
    "give_back_freed_memory",
    "keep_freed_memory",
    "speed_up_generation",
    "speed_up_optimizers",
    "speed_up_training",
]
