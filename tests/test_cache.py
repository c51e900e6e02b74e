"""The cache oracle: whatever was accepted, moved, released or refilled, scores equal a fresh forward pass (float64)."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._functorch.aot_autograd import aot_module_simplified

from forerun.accept import Verdict
from forerun.accept.rule import follow
from forerun.cache import BUCKET, KVCache
from forerun.graph import Graph
from forerun.model import Target
from forerun.tree import PADDING, Tree, chain
from models import VOCABULARY, tiny

ARCHITECTURES = ["llama", "mistral-window-8", "gemma2", "gemma3", "gpt2"]
Rows = list[list[int] | None]  # the tokens of every row, the pending one last; None: idle


@pytest.fixture(autouse=True)
def _as_in_a_step() -> Iterator[None]:
    with torch.inference_mode():
        yield


def drawn(generator: torch.Generator, high: int, count: int = 1, low: int = 0) -> list[int]:
    return torch.randint(low, high, (count,), generator=generator).tolist()


def close_to(target: Target, ours: Tensor, expected: Tensor) -> None:
    """Equal up to rounding; eager attention takes its softmax in float32."""
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6 if target.verify_attention == "eager" else 1e-10)


def random_tree(rows: Rows, size: int, generator: torch.Generator) -> Tree:
    """Branches and padding anywhere, a shape of its own for each row."""
    tokens, parents, depth = [], [], 0
    for row in rows:
        depths, own = {0: 0}, [0]
        for node in range(1, size):
            parent = list(depths)[drawn(generator, len(depths))[0]]
            if drawn(generator, 6) == [0]:
                own.append(PADDING)
                continue
            depths[node] = depths[parent] + 1
            own.append(parent)
        tokens.append([row[-1] if row else 0, *drawn(generator, VOCABULARY, size - 1)])
        parents.append(own)
        depth = max(depth, *depths.values())
    return Tree(torch.tensor(tokens), torch.tensor(parents), depth)


def random_chain(rows: Rows, depth: int, generator: torch.Generator) -> Tree:
    pending_B = torch.tensor([row[-1] if row else 0 for row in rows])
    lengths = drawn(generator, depth + 1, len(rows))
    return chain(
        pending_B, [drawn(generator, VOCABULARY, length) if row else [] for row, length in zip(rows, lengths, strict=True)]
    )


def path_to(tree: Tree, row: int, node: int) -> list[int]:
    """The drafted tokens from below node 0 down to a node."""
    path: list[int] = []
    while node:
        path.insert(0, int(tree.tokens_BN[row, node]))
        node = int(tree.parents_BN[row, node])
    return path


def fresh(target: Target, tokens: list[int]) -> Tensor:
    """The model's own scores after the last token."""
    return target.model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1]


def check(target: Target, cache: KVCache, tree: Tree, rows: Rows) -> None:
    """Every node's scores are those of a fresh forward pass over the row's tokens and the path to the node."""
    logits_BNV = target.verify(tree, cache).logits
    for i, row in enumerate(rows):
        for node in range(tree.size):
            if row and int(tree.parents_BN[i, node]) != PADDING:
                expected_V = fresh(target, row + path_to(tree, i, node))
                close_to(target, logits_BNV[i, node], expected_V)


def accept(cache: KVCache, tree: Tree, rows: Rows, generator: torch.Generator) -> list[int]:
    """Accept a random path of each row, commit it, and append it with a random token after it."""
    coin_BN = (torch.rand(tree.tokens_BN.shape, generator=generator) < 0.7) & tree.valid_BN
    path_BD, accepted_B = follow(tree, coin_BN)
    bonus = drawn(generator, VOCABULARY, tree.rows)
    cache.commit(tree, Verdict(path_BD, accepted_B, torch.tensor(bonus)), accepted_B.tolist())
    for i, row in enumerate(rows):
        if row is None:
            cache.release(i)
            continue
        end = int(path_BD[i, int(accepted_B[i]) - 1])
        row += [*path_to(tree, i, end), bonus[i]]
        assert cache.lengths[i] == len(row) - 1
    return accepted_B.tolist()


def start(target: Target, cache: KVCache, row: int, prompt: list[int], chunk: int) -> list[int]:
    logits_V = target.prefill(prompt, cache, row, chunk).logits
    close_to(target, logits_V, fresh(target, prompt))
    return [*prompt, 1]


@pytest.mark.parametrize("shape", ["trees", "chains", "both"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_scores_equal_a_fresh_forward_pass_after_every_round(architecture: str, shape: str) -> None:
    generator = torch.Generator().manual_seed(len(architecture) + len(shape))
    target = Target(tiny(architecture))
    cache = target.new_cache(rows=3, capacity=80)
    rows: Rows = [start(target, cache, 0, drawn(generator, VOCABULARY, 5), 512), None, None]
    rows[2] = start(target, cache, 2, drawn(generator, VOCABULARY, 19), chunk=4)  # longer than the windows
    counts: list[int] = []
    for round in range(8):
        if round == 2:
            rows[1] = start(target, cache, 1, drawn(generator, VOCABULARY, 9), chunk=2)
        if round == 4:  # the row's request ends, another one takes its place
            cache.release(2)
            rows[2] = start(target, cache, 2, drawn(generator, VOCABULARY, 3), chunk=3)
        if round == 6:
            cache.release(0)
            rows[0] = None
        as_chain = shape == "chains" or (shape == "both" and round % 2 == 1)
        tree = random_chain(rows, 4, generator) if as_chain else random_tree(rows, 6, generator)
        check(target, cache, tree, rows)
        counts += accept(cache, tree, rows, generator)
    assert len(set(counts)) >= 3, "accepted counts must be ragged"
    check(target, cache, chain(torch.tensor([row[-1] if row else 0 for row in rows]), [[], [], []]), rows)


def test_scores_hold_where_attention_reads_the_next_bucket() -> None:
    generator = torch.Generator().manual_seed(0)
    target = Target(tiny("llama", max_position_embeddings=2 * BUCKET))
    cache = target.new_cache(rows=2, capacity=BUCKET + 100)
    rows: Rows = [start(target, cache, i, drawn(generator, VOCABULARY, BUCKET - 5 - i), 100) for i in range(2)]
    for _ in range(4):
        tree = random_tree(rows, 5, generator)
        check(target, cache, tree, rows)
        accept(cache, tree, rows, generator)
    assert min(cache.lengths) > BUCKET - 5
    assert max(cache.lengths) > BUCKET


def test_the_last_slot_takes_the_padding_that_runs_past_it() -> None:
    """A row near its end beside one that drafts deep: its padding must not land on its tokens."""
    generator = torch.Generator().manual_seed(0)
    target = Target(tiny("llama"))
    capacity = 16
    cache = target.new_cache(rows=2, capacity=capacity)
    rows: Rows = [
        start(target, cache, 0, drawn(generator, VOCABULARY, capacity - 3), 512),
        start(target, cache, 1, [5, 6], 512),
    ]
    pending_B = torch.tensor([1, 1])
    tree = chain(pending_B, [[], [4, 5, 6, 7, 8]])
    slots_BN, read = cache.place(tree.size, torch.device("cpu"))
    assert slots_BN[0].tolist() == [13, 14, 15, 15, 15, 15]
    assert read == capacity
    check(target, cache, tree, rows)
    bushy = Tree(tree.tokens_BN, torch.tensor([[0, 0, -1, -1, -1, -1], [0, 0, 0, 1, 2, 2]]), 2)
    check(target, cache, bushy, rows)
    check(target, cache, tree, rows)  # once more: the first pass did no harm


def test_a_prompt_lands_in_its_own_row_only() -> None:
    target = Target(tiny("llama"))
    cache = target.new_cache(rows=3, capacity=12)
    start(target, cache, 1, [3, 4, 5, 6], 2)
    assert cache.lengths == [0, 4, 0]
    for layer in cache.layers:
        for states in (layer.keys, layer.values):
            assert states is not None
            used = states.abs().sum((1, 3)) > 0
            assert used.tolist() == [[False] * 12, [True] * 4 + [False] * 8, [False] * 12]


def test_a_row_in_use_is_not_filled_again() -> None:
    target = Target(tiny("llama"))
    cache = target.new_cache(rows=1, capacity=12)
    start(target, cache, 0, [3, 4], 512)
    with pytest.raises(AssertionError, match="in use"):
        target.prefill([1], cache, 0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nbytes_are_those_of_keys_and_values(architecture: str) -> None:
    target = Target(tiny(architecture))
    cache = target.new_cache(rows=3, capacity=20)
    assert cache.nbytes == 0
    start(target, cache, 0, [1, 2], 512)
    heads = getattr(target.config, "num_key_value_heads", target.config.num_attention_heads)
    size = getattr(target.config, "head_dim", None) or target.config.hidden_size // target.config.num_attention_heads
    layers = target.config.num_hidden_layers
    assert cache.nbytes == 2 * layers * 3 * heads * 20 * size * torch.float64.itemsize


def test_committing_moves_nothing_for_chains() -> None:
    """An accepted chain is in its place already."""
    target = Target(tiny("llama"))
    cache = target.new_cache(rows=1, capacity=20)
    row = start(target, cache, 0, [1, 2, 3], 512)
    tree = chain(torch.tensor([row[-1]]), [[7, 8, 9]])
    target.verify(tree, cache)
    before = [states.clone() for layer in cache.layers for states in (layer.keys, layer.values)]
    cache.commit(tree, Verdict(torch.arange(4)[None], torch.tensor([3]), torch.tensor([0])), [3])
    assert cache.lengths == [6]
    after = [states for layer in cache.layers for states in (layer.keys, layer.values)]
    assert all(bool((one == other).all()) for one, other in zip(before, after, strict=True))


def test_a_traced_pass_writes_its_own_slots_and_copies_no_cache():
    """Keys and values that reach the tracer twice, as two views of one memory, become copies of that whole memory."""
    target = Target(tiny("llama"), compile=False)
    cache = target.new_cache(2, BUCKET)
    programs = []

    def backend(program, inputs):
        return aot_module_simplified(program, inputs, fw_compiler=lambda traced, _: programs.append(traced) or traced.forward)

    target.prefill([1, 2, 3], cache, 0)
    function = cache.graph.function
    cache.graph = Graph(torch.compile(function, backend=backend, fullgraph=True), False)
    target.verify(chain(torch.tensor([4, 0]), [[5], [6]]), cache)
    [program] = programs
    called = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert any("index_copy" in name for name in called)
    assert not any("as_strided" in name for name in called)
