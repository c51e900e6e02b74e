"""Tiny random models of every served architecture, made in code."""

import functools

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

VOCABULARY = 97
NO_SPECIAL = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    **NO_SPECIAL,
}
MIXED = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
BUILDERS = {
    "llama": lambda **kw: LlamaForCausalLM(LlamaConfig(**SIZES | kw)),
    "mistral-window-8": lambda **kw: MistralForCausalLM(MistralConfig(**SIZES | {"sliding_window": 8} | kw)),
    "qwen2": lambda **kw: Qwen2ForCausalLM(Qwen2Config(**SIZES | kw)),
    "qwen3": lambda **kw: Qwen3ForCausalLM(Qwen3Config(**SIZES | {"head_dim": 8} | kw)),
    "gemma2": lambda **kw: Gemma2ForCausalLM(Gemma2Config(**SIZES | MIXED | {"head_dim": 8} | kw)),
    "gemma3": lambda **kw: Gemma3ForCausalLM(Gemma3TextConfig(**SIZES | MIXED | {"head_dim": 8} | kw)),
    "phi3": lambda **kw: Phi3ForCausalLM(Phi3Config(**SIZES | kw)),
    "gpt2": lambda **kw: GPT2LMHeadModel(
        GPT2Config(**{"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, **NO_SPECIAL} | kw)
    ),
    "gpt-neox": lambda **kw: GPTNeoXForCausalLM(
        GPTNeoXConfig(**{k: v for k, v in SIZES.items() if k != "num_key_value_heads"} | kw)
    ),
    "opt": lambda **kw: OPTForCausalLM(
        OPTConfig(
            **{"vocab_size": VOCABULARY, "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
            | {"max_position_embeddings": 256, "word_embed_proj_dim": 32, **NO_SPECIAL}
            | kw
        )
    ),
}

MIXTURES = {
    "mixtral": lambda **kw: MixtralForCausalLM(MixtralConfig(**SIZES | {"num_local_experts": 4} | kw)),
    "qwen3-moe": lambda **kw: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**SIZES | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8} | kw)
    ),
}
"""Mixtures of experts, which not all of forerun takes."""


@functools.cache
def tiny(
    name: str, seed: int = 0, scale: float = 2.5, dtype: torch.dtype = torch.float64, **overrides: object
) -> PreTrainedModel:
    """A model whose logits are far from flat (weights scaled up), so that greedy choices mean something."""
    torch.manual_seed(seed)
    extra = {"attn_implementation": "eager"} if name == "gemma2" else {}
    model = (BUILDERS | MIXTURES)[name](**extra, **overrides).eval().to(dtype)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(scale)
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():  # zeros, as a new model has, would hide a bias that is lost or misplaced
        if isinstance(module, torch.nn.Linear) and module.bias is not None:
            module.bias.data.copy_(0.02 * torch.randn(module.bias.shape, generator=generator))
    return model.requires_grad_(False)


def draft_for(name: str = "llama", **kw: object) -> PreTrainedModel:
    """A smaller model of the same vocabulary."""
    return tiny(name, seed=1, num_hidden_layers=1, **kw)


def near_copy(model: PreTrainedModel, noise: float = 0.05) -> PreTrainedModel:
    """A draft that agrees often, not always: the model with noise on its weights."""
    import copy

    torch.manual_seed(2)
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        parameter.data += noise * parameter.data.std() * torch.randn_like(parameter) if parameter.ndim > 1 else 0
    return other


def prompts(lengths: tuple[int, ...] = (5, 11, 23, 3, 17, 30, 2)) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(1)
    return [tuple(torch.randint(0, VOCABULARY, (n,), generator=generator).tolist()) for n in lengths]


def plain_greedy(model: PreTrainedModel, prompt: tuple[int, ...], new: int) -> list[int]:
    """What transformers generates."""
    ids = torch.tensor([prompt])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    return out[0, len(prompt) :].tolist()


def wide_headed(**sizes: object) -> LlamaForCausalLM:
    """A Llama with heads of 32, which vLLM's CPU attention needs."""
    own = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    return LlamaForCausalLM(LlamaConfig(**SIZES | own | sizes)).requires_grad_(False)


def redraw(model: PreTrainedModel, scale: float, kept: float = 0.0) -> None:
    """Draw every matrix anew, and keep so much of what it was; `scale` is that of its products."""
    for weight in model.parameters():
        if weight.ndim > 1:
            weight.copy_(kept * weight + torch.randn_like(weight) * (scale / weight.shape[1] ** 0.5))
