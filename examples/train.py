"""Trains a small model by the official recipe: data, step, evaluation, checkpoint."""

import tempfile
from pathlib import Path

from flax import nnx

from goose_jax import RWKV7, RWKV7Config
from goose_jax.checkpoints import CheckpointMetadata, load_checkpoint, save_checkpoint
from goose_jax.data import encode_documents, random_batch, read_documents, split_documents
from goose_jax.text import ByteTokenizer
from goose_jax.training import (
    OptimizerConfig,
    init_train_state,
    make_evaluation,
    make_train_step,
    with_params,
)

TEXT = Path(__file__).parents[1] / "pallas_kernels"  # any text file, or a folder of them


def main(steps: int = 50) -> tuple[float, float]:
    tokenizer = ByteTokenizer()
    documents = read_documents(TEXT, patterns=["*.py"])
    training, held_out = split_documents(documents, held_out_bytes=4096)
    tokens = encode_documents(training, tokenizer)

    config = RWKV7Config(
        vocab_size=tokenizer.vocab_size, hidden_size=64, num_layers=2, compute_dtype="float32"
    )
    model = RWKV7(config, rngs=nnx.Rngs(0))
    recipe = OptimizerConfig(total_steps=steps, learning_rate=4e-3, final_learning_rate=4e-4)
    train_step = make_train_step(model, recipe)  # one compiled program
    evaluate = make_evaluation(model, held_out, tokenizer, batch_size=8, sequence_length=64)

    state = init_train_state(model, recipe)
    before = evaluate(state.params)
    for step in range(steps):
        batch = random_batch(tokens, step, batch_size=8, sequence_length=64, seed=0)
        state, metrics = train_step(state, batch)  # uses up the state that goes in
        if step % 10 == 0:
            print(f"step {step}: loss {metrics.loss:.3f}, gradient {metrics.gradient_norm:.2f}")
    after = evaluate(state.params)
    print(f"held out: {before:.3f} bits per byte before, {after:.3f} after")

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint"
        save_checkpoint(path, with_params(model, state.params), CheckpointMetadata("byte", steps))
        trained, metadata = load_checkpoint(path)
        print(f"loaded: {trained.config.num_layers} layers, {metadata.step} steps")
    return before, after


if __name__ == "__main__":
    main()
