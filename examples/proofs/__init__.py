"""Small tasks that show what RWKV-7 can do: each trains a model, measures it, and draws a plot.

`python -m examples.proofs --help` lists them; docs/proofs.md says what they show.
"""
