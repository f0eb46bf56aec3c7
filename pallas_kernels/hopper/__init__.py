"""Parts that kernels for Hopper GPUs are built from; they know no operator.

target          compiles kernels, for a GPU or for the interpreter
grid            which row, head and value channels a block works on
ring            slots of shared memory that copies fill ahead, with their barriers
tiles           matrices of 64 x 64 in shared memory and registers, products and sums of them
registers       conversions and masks of tiles, loads and stores, in PTX
products        products of tiles by tensor cores, in PTX
matrix_product  products of large matrices, whose tiles an epilogue finishes
vectors         eight neighbouring channels, in PTX
token_tiles     tiles of tokens and channels, for passes over tokens
whole_tokens    whole tokens in the registers of a block
token_walk      the order in which kernels with a token shift read tokens
token_plan      blocks, registers and copies ahead of the work of such kernels
state_vectors   layouts of a state and its vectors, for one token at a time
"""
