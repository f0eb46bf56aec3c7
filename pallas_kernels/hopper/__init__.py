"""Parts that kernels for Hopper GPUs are built from; they know no operator.

target          compiles kernels, for a GPU or for the interpreter
grid            which row, head and value channels a block works on
ring            slots of shared memory that copies fill ahead, with their barriers
tiles           matrices of 64 x 64 in shared memory and registers, products and sums of them
registers       conversions and masks of tiles, loads and stores, in PTX
products        products of tiles by tensor cores, in PTX
state_vectors   layouts of a state and its vectors, for one token at a time
"""
