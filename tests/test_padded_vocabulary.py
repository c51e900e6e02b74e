"""A draft whose embeddings are padded to another number of rows than the target's: same tokens, other matrix sizes."""

import copy

import pytest
import torch
from transformers import PreTrainedModel

from forerun.accept import choose
from forerun.draft import Constant, DraftModel
from forerun.engine import Engine
from forerun.model import Target
from forerun.types import Request, Sampling, complete
from models import VOCABULARY, near_copy, plain_greedy, prompts, tiny

NEW = 24


def resized(model: PreTrainedModel, rows: int) -> PreTrainedModel:
    """The same model with other numbers of embedding rows; new ones are large, so that drafting one would show."""
    other = copy.deepcopy(model)
    for get, put in (
        (other.get_input_embeddings, other.set_input_embeddings),
        (other.get_output_embeddings, other.set_output_embeddings),
    ):
        weight = get().weight.detach()
        grown = torch.cat([weight, 9 * weight[: max(0, rows - len(weight))]])[:rows]
        layer = get()
        layer.weight = torch.nn.Parameter(grown, requires_grad=False)
        layer.num_embeddings = layer.out_features = rows
        put(layer)
    other.config.vocab_size = rows
    return other


def engine(rows: int, draft_rows: int, rule: str = "auto") -> Engine:
    target = Target(tiny("llama"))
    draft = DraftModel(Target(resized(near_copy(tiny("llama")), draft_rows)), Constant(4), rows, 96, vocabulary=VOCABULARY)
    return Engine(target, draft, choose(rule, draft.drawn), rows=rows, capacity=96, debug=True)


@pytest.mark.parametrize("draft_rows", [VOCABULARY - 30, VOCABULARY + 31])
def test_greedy_output_is_the_targets_own(draft_rows: int) -> None:
    requests = [Request(str(i), prompt, Sampling(max_new=NEW)) for i, prompt in enumerate(prompts())]
    done = complete(engine(3, draft_rows), requests)
    assert [list(one.tokens) for one in done] == [plain_greedy(tiny("llama"), prompt, NEW) for prompt in prompts()]
    assert any(token >= draft_rows for one in done for token in one.tokens) == (draft_rows < VOCABULARY)
    assert sum(round.accepted for one in done for round in one.rounds) > 0


@pytest.mark.parametrize("draft_rows", [VOCABULARY - 30, VOCABULARY + 31])
@pytest.mark.parametrize("rule", ["standard", "block", "match"])
def test_drawn_drafts_are_judged_by_laws_over_the_targets_vocabulary(draft_rows: int, rule: str) -> None:
    requests = [Request(str(i), prompt, Sampling(temperature=1.0, max_new=NEW, seed=i)) for i, prompt in enumerate(prompts())]
    one = engine(3, draft_rows, rule)
    proposed = []
    propose = one.drafter.propose

    def watched(batch: object) -> object:
        proposed.append(propose(batch))
        return proposed[-1]

    one.drafter.propose = watched
    assert all(len(done.tokens) == NEW for done in complete(one, requests))
    laws = [tree.probs_BNV[:, 1:] for tree in proposed if tree.probs_BNV is not None and tree.size > 1]
    assert {law.shape[2] for law in laws} == {VOCABULARY}
    assert all(torch.allclose(law.sum(-1), torch.ones(())) for law in (law.float() for law in laws))
    assert all(float(law[..., draft_rows:].sum()) == 0 for law in laws)
