"""MLP speculators as IBM's accelerators store them.

Sources: vllm-project/vllm, vllm/model_executor/models/mlp_speculator.py and vllm/transformers_utils/configs/mlp_speculator.py;
foundation-model-stack/fms-extras, fms_extras/models/hf/modeling_mlp_speculator.py; config.json of
ibm-ai-platform/codellama-34b-accelerator and ibm-granite/granite-20b-code-instruct-accelerator.
"""

from __future__ import annotations

from torch import Tensor

from forerun.heads.formats.files import Found, Parts, Source, renamer, type_name
from forerun.heads.mlp import MLPShape, MLPSpeculator

rename = renamer(
    {
        "embeddings": "speculator.emb",
        "projections": "speculator.proj",
        "norms": "speculator.ln",
        "outputs": "speculator.head",
    }
)


def read(source: Source) -> Found:
    """Tied steps (tie_weights) get weights of their own, which are the same."""
    settings = source.settings
    shape = MLPShape(
        hidden_size=settings["emb_dim"], vocab_size=settings["vocab_size"], heads=settings["n_predict"],
        inner_size=settings.get("inner_dim", 0), scale_input=settings.get("scale_input", False),
    )  # fmt: skip
    return Found(shape, rename, untied(source, shape) if settings.get("tie_weights", False) else source.tensors)


def untied(source: Source, shape: MLPShape) -> dict[str, Tensor]:
    """Steps that the file leaves out take the first step's tensors; of the projections the second's, the first being apart."""
    tensors = dict(source.tensors)
    for kind, leaf in (("emb", "weight"), ("proj", "weight"), ("ln", "weight"), ("ln", "bias"), ("head", "weight")):
        first = 1 if kind == "proj" else 0
        shared = tensors.get(f"speculator.{kind}.{first}.{leaf}")
        for step in range(first + 1, shape.heads):
            if shared is not None:
                tensors.setdefault(f"speculator.{kind}.{step}.{leaf}", shared)
    return tensors


def write(head: MLPSpeculator) -> Parts:
    shape = head.shape
    settings = {
        "architectures": ["MLPSpeculatorPreTrainedModel"],
        "model_type": "mlp_speculator",
        "emb_dim": shape.hidden_size,
        "inner_dim": shape.inner,
        "vocab_size": shape.vocab_size,
        "n_predict": shape.heads,
        "top_k_tokens_per_head": [1] * shape.heads,  # a chain
        "n_candidates": 1,
        "scale_input": shape.scale_input,
        "tie_weights": False,
        "torch_dtype": type_name(head),
    }
    return Parts(settings, {rename(name): tensor for name, tensor in head.state_dict().items()})
