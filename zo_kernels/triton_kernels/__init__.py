"""Triton kernels behind `zo_kernels.backends.triton` (the launchers).

    noise       the noise contract on the device: Philox words, normals, signs, rounding bits
    rounding    fp32 to bf16 and fp16, to nearest and stochastically
    directions  what directions, in their form, do to a tile: the update and its rounding
    span        the shared walk over consecutive elements: 128-bit body, masked tail
    launch      what every launch shares: sizes of tiles, the device, the second stage of statistics
    table       one launch for many tensors: the tables, built and read
    statistics  mean, variance, norm, non-finite count, in two stages
    axpy        one launch for a whole model's tensors, in place
    states      the same by a rule that keeps state
    scratch     one tensor, or some of its rows, into a scratch and its mirror; with an update first
    dot         products with noise and statistics: what only reads

In Triton's interpreter (TRITON_INTERPRET=1 before this package is imported) the same code runs on CPU
tensors, with `noise.HARDWARE` false: accurate functions stand in for the hardware's approximations, and
integer arithmetic for its conversion to bf16.
"""
