"""Heads fitted to the texts that a tiny model writes, so that their guesses are often right, and deep ones too."""

import functools

import torch
from torch import Tensor

from forerun.heads import Medusa, MedusaShape, MLPShape, MLPSpeculator
from models import plain_greedy, prompts, tiny

NEW = (30, 12, 40, 8, 25, 33, 19)


@functools.cache
def reference(architecture: str) -> list[list[int]]:
    return [plain_greedy(tiny(architecture), prompt, new) for prompt, new in zip(prompts(), NEW, strict=True)]


@functools.cache
def texts(architecture: str) -> list[tuple[Tensor, Tensor]]:
    """Of each text the tokens from the pending one on, [T], and the target's last hidden state before each, [T, H]."""
    pairs = []
    for prompt, output in zip(prompts(), reference(architecture), strict=True):
        tokens = torch.tensor([*prompt, *output])
        states = tiny(architecture)(tokens[None], output_hidden_states=True).hidden_states[-1][0]
        pairs.append((tokens[len(prompt) :], states[len(prompt) - 1 : -1]))
    return pairs


def fit(features: list[Tensor], tokens: list[Tensor], vocabulary: int) -> Tensor:
    """The output weights [V, H] that tell the tokens from the features, by least squares."""
    wanted = torch.nn.functional.one_hot(torch.cat(tokens), vocabulary).double()
    return torch.linalg.lstsq(torch.cat(features), wanted).solution.T


def medusa(architecture: str, heads: int = 4) -> Medusa:
    vocabulary, size = tiny(architecture).get_output_embeddings().weight.shape
    torch.manual_seed(0)
    head = Medusa(MedusaShape(size, vocabulary, heads)).double().requires_grad_(False).eval()
    for k, (blocks, output) in enumerate(zip(head.blocks, head.outputs, strict=True)):
        features = [blocks(states[: len(states) - 1 - k]) for _, states in texts(architecture)]
        output.weight.data = fit(features, [tokens[1 + k :] for tokens, _ in texts(architecture)], vocabulary)
    return head


def mlp(architecture: str, heads: int = 3, inner: int = 48, scale_input: bool = False) -> MLPSpeculator:
    vocabulary, size = tiny(architecture).get_output_embeddings().weight.shape
    torch.manual_seed(0)
    head = MLPSpeculator(MLPShape(size, vocabulary, heads, inner, scale_input)).double().requires_grad_(False).eval()
    running = [head.first(states) for _, states in texts(architecture)]
    for i in range(heads):
        left = [tokens[i:-1] for tokens, _ in texts(architecture)]
        running = [head.step(i, state[: len(own)], own)[0] for state, own in zip(running, left, strict=True)]
        # Sharpened, so that drawing from it means something.
        head.outputs[i].weight.data = 6 * fit(running, [tokens[i + 1 :] for tokens, _ in texts(architecture)], vocabulary)
    return head
