"""Log-likelihoods: every architecture against one text at a time, shared contexts, budgets and clipping."""

import copy

import pytest
import torch

from forerun.model import Target
from forerun.scoring import CHUNK, ModelScorer
from forerun.types import Score, UserError
from models import BUILDERS, VOCABULARY, tiny


def alone(model, context, continuation) -> Score:
    """The definition, one text at a time."""
    ids = torch.tensor([[*context, *continuation]])
    laws = model(input_ids=ids, use_cache=False).logits[0].double().log_softmax(-1)
    told = list(enumerate(continuation, len(context)))
    return Score(
        sum(float(laws[at - 1, token]) for at, token in told), all(int(laws[at - 1].argmax()) == token for at, token in told)
    )


def text(seed: int, length: int) -> tuple[int, ...]:
    return tuple(torch.randint(0, VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed)).tolist())


def mixture():
    """Contexts of one continuation and of several, longer than a window of 8 and shorter, one token and many."""
    contexts = [text(i, length) for i, length in enumerate((1, 3, 12, 30, 17))]
    pairs = [(context, text(10 + i, 1 + 3 * i)) for i, context in enumerate(contexts)]
    for i, context in enumerate((text(7, 20), text(8, 5), contexts[3])):
        pairs += [(context, text(30 + 5 * i + j, 1 + 4 * j)) for j in range(3)]
    pairs += [(text(9, 6), text(50 + j, 1)) for j in range(4)]
    return pairs


def same(found, expected, close: float = 1e-9) -> None:
    assert [score.logprob for score in found] == pytest.approx([score.logprob for score in expected], rel=close)
    assert [score.greedy for score in found] == [score.greedy for score in expected]


@pytest.mark.parametrize("attention", ["own", "served"])
@pytest.mark.parametrize("name", BUILDERS)
def test_every_architecture_scores_as_one_text_at_a_time(name: str, attention: str) -> None:
    # gemma2 runs in eager attention, which takes its softmax in float32 whatever the type.
    kind, close = ({"dtype": torch.float32}, 1e-5) if name == "gemma2" else ({}, 1e-9)
    model = tiny(name, seed=1, **kind)
    expected = [alone(model, *pair) for pair in mixture()]
    if attention == "served":
        model = Target(copy.deepcopy(model)).model  # which changes its attention
    same(ModelScorer(model).score(mixture()), expected, close)
    same(ModelScorer(model, tokens=40).score(mixture()), expected, close)  # many small batches


def test_greedy_says_what_greedy_decoding_would_write() -> None:
    model = tiny("llama")
    context = list(text(0, 9))
    written = []
    for _ in range(5):
        written.append(int(model(input_ids=torch.tensor([context + written])).logits[0, -1].argmax()))
    other = [*written[:4], (written[4] + 1) % VOCABULARY]
    scores = ModelScorer(model).score([(context, written), (context, other), (context, written[:1])])
    assert [score.greedy for score in scores] == [True, False, True]
    assert [score.greedy for score in ModelScorer(model).score([(context, other)])] == [False]


def test_a_shared_context_is_read_once() -> None:
    model, read = tiny("llama"), []
    hook = model.get_input_embeddings().register_forward_hook(lambda _module, inputs, _out: read.append(inputs[0].numel()))
    try:
        ModelScorer(model).score([(text(0, 50), text(1 + i, 6)) for i in range(4)])
    finally:
        hook.remove()
    assert read == [50, 4 * 5]


def test_long_continuations_are_read_in_chunks() -> None:
    model = tiny("llama", max_position_embeddings=2 * CHUNK + 40)
    pair = (text(0, 3), text(1, CHUNK + 30))
    same(ModelScorer(model).score([pair]), [alone(model, *pair)])


def test_batches_keep_to_their_budgets(monkeypatch: pytest.MonkeyPatch) -> None:
    model, shapes = tiny("llama"), []
    hook = model.register_forward_hook(lambda _module, _args, out: shapes.append(tuple(out.logits.shape)))
    pairs = [(text(i, 10), text(100 + i, 5)) for i in range(12)]
    try:
        ModelScorer(model, tokens=60).score(pairs)
        assert [shape[0] for shape in shapes] == [4, 4, 4]
        shapes.clear()
        monkeypatch.setattr("forerun.scoring.LOGITS", 3 * 6 * VOCABULARY)
        ModelScorer(model).score(pairs)
        assert [shape[0] for shape in shapes] == [3, 3, 3, 3]
    finally:
        hook.remove()


def test_what_does_not_fit_is_clipped_from_the_left() -> None:
    model = tiny("llama")  # reads 256 tokens
    context, continuation = text(0, 300), text(1, 20)
    assert ModelScorer(model).limit == 256
    clipped = [*context, *continuation][-257:]
    same(ModelScorer(model).score([(context, continuation)]), [alone(model, clipped[:-20], continuation)])
    with pytest.raises(UserError, match="256"):
        ModelScorer(model).score([(context, text(2, 257))])


def test_no_pairs_have_no_scores() -> None:
    assert ModelScorer(tiny("llama")).score([]) == []
