"""The command of lm-evaluation-harness, which then knows the model "goose-jax"."""

import goose_jax.evaluation.harness  # noqa: F401, registers the model

if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
