"""The command of lm-evaluation-harness, which then knows the model "goose-jax"."""

from lm_eval.__main__ import cli_evaluate

import goose_jax.evaluation.harness  # noqa: F401, registers the model

if __name__ == "__main__":
    cli_evaluate()
