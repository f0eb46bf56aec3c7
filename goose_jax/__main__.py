"""Runs the command `goose-jax`, as `python -m goose_jax`."""

from goose_jax.cli.main import run

if __name__ == "__main__":
    run()
