"""Make a model smaller and faster: GPTQ, rounding, bitsandbytes, structured pruning, and checkpoints that hold the result."""
