"""What a model is worth: perplexity, programs that run, multiple choice, mathematics, and lm-evaluation-harness."""
