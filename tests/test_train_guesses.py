"""What training computes: guesses as drafting makes them, the loss, and validation's counts; against slow, plain versions."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from forerun.heads import Eagle, Medusa, MedusaShape, MLPShape, MLPSpeculator
from forerun.heads.eagle import shape_for
from forerun.train.data import padded
from forerun.train.losses import Distance, anchors, hits, law, loss
from forerun.train.settings import TeachConfig
from forerun.train.students import DraftStudent, EagleStudent, Guess, MedusaStudent, MLPStudent
from forerun.train.teacher import Lesson, Streamed
from models import VOCABULARY, tiny

CPU = torch.device("cpu")


def randomized(module: nn.Module, seed: int = 3) -> Any:
    torch.manual_seed(seed)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module.double()


def lesson_for(features: tuple[int, ...], lengths: tuple[int, ...] = (14, 14, 9), prompt: int = 3, **teach: Any) -> Lesson:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(0, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]
    sequences = padded(rows, prompt)
    return Streamed(tiny("llama", num_hidden_layers=4), features, TeachConfig(**teach), sequences, CPU).lesson(
        torch.arange(len(rows)).numpy()
    )


@pytest.mark.parametrize("version", [1, 3])
def test_eagle_is_trained_on_what_it_drafts(version: Any) -> None:
    """Guess s from every anchor is what drafting with a cache, entry by entry, computes after the target's entries."""
    target = tiny("llama", num_hidden_layers=4)
    shape = shape_for(target.config, version)
    head: Eagle = randomized(Eagle(shape))
    lesson = lesson_for(shape.features)
    embed, depth = target.get_input_embeddings(), 5
    student = EagleStudent(head, target, depth, noise=0.1, feature_weight=1.0)
    anchors_A = anchors(lesson)
    found = [guess.logits_BAV for guess in student.guesses(lesson, anchors_A, None)]
    assert len(found) == depth
    last = lesson.tokens_BT.shape[1] - 1
    for i, anchor in enumerate(anchors_A.tolist()):
        cache = DynamicCache(config=shape.llama())
        places = torch.arange(anchor + 1)[None]
        read = embed(lesson.tokens_BT[:, 1 : anchor + 2])
        state = head(read, head.enter(lesson.features_BTF[:, : anchor + 1]), places, None, cache)[:, -1:]
        for s in range(min(depth, last - anchor)):
            if s:
                read = embed(lesson.tokens_BT[:, anchor + s + 1][:, None])
                state = head(read, state, torch.tensor([[anchor + s]]), None, cache)
            wanted = head.logits(state[:, 0], target.get_output_embeddings())
            torch.testing.assert_close(found[s][:, i], wanted, rtol=1e-9, atol=1e-9)


def test_a_chain_does_not_see_what_lies_past_its_anchor() -> None:
    """Changing the features and tokens after an anchor's chain leaves its guesses as they were."""
    target = tiny("llama", num_hidden_layers=4)
    shape = shape_for(target.config, 3)
    student = EagleStudent(randomized(Eagle(shape)), target, 3, 0.0, 0.0)
    lesson = lesson_for(shape.features)
    places = anchors(lesson)
    before = [g.logits_BAV[:, 2] for g in student.guesses(lesson, places, None)]
    anchor = int(places[2])
    tokens, features = lesson.tokens_BT.clone(), lesson.features_BTF.clone()
    tokens[:, anchor + 4 :] = 1  # guess 2 reads token anchor + 3
    features[:, anchor + 1 :] = 0
    changed = replace(lesson, tokens_BT=tokens, features_BTF=features)
    after = [g.logits_BAV[:, 2] for g in student.guesses(changed, places, None)]
    for one, other in zip(before, after, strict=True):
        assert torch.equal(one, other)
    tokens[:, anchor + 3] = 1
    moved = [g.logits_BAV[:, 2] for g in student.guesses(replace(changed, tokens_BT=tokens), places, None)]
    assert torch.equal(moved[1], after[1])
    assert not torch.equal(moved[2], after[2])


def test_heads_guess_from_the_anchors_state() -> None:
    lesson = lesson_for((-1,))
    places = anchors(lesson)
    hidden = lesson.features_BTF[:, places]
    medusa: Medusa = randomized(Medusa(MedusaShape(32, VOCABULARY, heads=3)))
    found = [g.logits_BAV for g in MedusaStudent(medusa).guesses(lesson, places, None)]
    torch.testing.assert_close(torch.stack(found, -2), medusa(hidden))
    mlp: MLPSpeculator = randomized(MLPSpeculator(MLPShape(32, VOCABULARY, heads=3)))
    guesses = [g.logits_BAV for g in MLPStudent(mlp).guesses(lesson, places, None)]
    last = lesson.tokens_BT.shape[1] - 1
    for i, anchor in enumerate(places.tolist()):
        state = mlp.first(lesson.features_BTF[:, anchor])
        for s in range(min(3, last - anchor)):
            state, logits = mlp.step(s, state, lesson.tokens_BT[:, anchor + s + 1])
            torch.testing.assert_close(guesses[s][:, i], logits)


def test_a_draft_guesses_as_a_language_model() -> None:
    lesson = lesson_for(())
    draft: Any = tiny("llama", seed=1, num_hidden_layers=1)
    places = anchors(lesson)
    wanted = draft(input_ids=lesson.tokens_BT).logits
    found = [g.logits_BAV for g in DraftStudent(draft, 4).guesses(lesson, places, None)]
    for s, logits in enumerate(found):
        inside = places + s + 1 < lesson.tokens_BT.shape[1]
        torch.testing.assert_close(logits[:, inside], wanted[:, (places + s + 1)[inside]])
    assert len(list(DraftStudent(draft, 4).guesses(lesson, places, torch.Generator()))) == 1


def test_a_sequence_teaches_the_same_beside_longer_ones() -> None:
    """Padding changes neither what the target says of a sequence nor what is counted."""
    student = MedusaStudent(randomized(Medusa(MedusaShape(32, VOCABULARY, heads=3))))
    lesson = lesson_for((-1,), lengths=(14, 14, 9))
    alone = replace(
        lesson, tokens_BT=lesson.tokens_BT[2:, :9], lengths_B=lesson.lengths_B[2:], features_BTF=lesson.features_BTF[2:, :9],
        ids_BTK=lesson.ids_BTK[2:, :9], probs_BTK=lesson.probs_BTK[2:, :9],
    )  # fmt: skip
    others = replace(
        lesson, tokens_BT=lesson.tokens_BT[:2], lengths_B=lesson.lengths_B[:2], features_BTF=lesson.features_BTF[:2],
        ids_BTK=lesson.ids_BTK[:2], probs_BTK=lesson.probs_BTK[:2],
    )  # fmt: skip
    together = hits(student, alone) + hits(student, others)
    whole = hits(student, lesson)
    for name in ("counted_S", "ranks_SR", "alive_S", "taken_S"):
        assert torch.equal(getattr(whole, name), getattr(together, name)), name
    assert hits(student, alone).counted_S.tolist() == [9 - 3, 9 - 4, 9 - 5]
    random = torch.Generator()
    sums = [
        each * h.counted_S
        for each, h in ((loss(student, x, anchors(x), random, 1.0)[1], hits(student, x)) for x in (lesson, alone, others))
    ]
    torch.testing.assert_close(sums[0], sums[1] + sums[2])


@pytest.mark.parametrize("all_tokens", [True, False])
def test_the_distance_is_a_cross_entropy_and_so_is_its_slope(all_tokens: bool) -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 20, dtype=torch.float64, requires_grad=True)
    ids = None if all_tokens else torch.rand(2, 3, 20).topk(6, -1).indices
    probs = torch.rand(2, 3, 20 if all_tokens else 6, dtype=torch.float64)
    said = logits.log_softmax(-1)
    wanted = -((said if ids is None else said.gather(-1, ids)) * probs).sum(-1)
    found = Distance.apply(logits, ids, probs)
    torch.testing.assert_close(found, wanted)
    weights = torch.rand(2, 3, dtype=torch.float64)
    (slope,), (wanted_slope,) = (torch.autograd.grad((x * weights).sum(), logits) for x in (found, wanted))
    torch.testing.assert_close(slope, wanted_slope)


def test_laws_over_a_smaller_vocabulary() -> None:
    full = lesson_for((), top=0)
    own = torch.tensor([2, 5, 7, 40, 96])
    places = torch.tensor([3, 6])
    ids, probs = law(full, places, own)
    assert ids is None
    wanted = full.probs_BTK[:, places][..., own]
    torch.testing.assert_close(probs, wanted / wanted.sum(-1, keepdim=True))
    ids, probs = law(lesson_for((), top=VOCABULARY), places, own)
    torch.testing.assert_close(torch.zeros_like(wanted).scatter_add_(-1, ids, probs), wanted / wanted.sum(-1, keepdim=True))
    few = replace(full, ids_BTK=torch.ones(3, 14, 1, dtype=torch.long), probs_BTK=torch.ones(3, 14, 1, dtype=torch.float64))
    assert law(few, places, own)[1].sum() == 0


def test_the_teachers_laws_are_the_targets() -> None:
    target: Any = tiny("llama", num_hidden_layers=4)
    full, few, sharp = (lesson_for((1, -1), **teach) for teach in ({"top": 0}, {"top": 5}, {"top": 0, "temperature": 0.5}))
    out = target(input_ids=full.tokens_BT, output_hidden_states=True)
    torch.testing.assert_close(full.probs_BTK, out.logits.softmax(-1))
    torch.testing.assert_close(sharp.probs_BTK, (2 * out.logits).softmax(-1))
    torch.testing.assert_close(full.features_BTF, torch.cat([out.hidden_states[1], out.hidden_states[-1]], -1))
    best = full.probs_BTK.topk(5, -1)
    assert torch.equal(few.ids_BTK, best.indices)
    torch.testing.assert_close(few.probs_BTK, best.values / best.values.sum(-1, keepdim=True))


@dataclass(frozen=True)
class Rigged:
    """Guesses fixed in advance: [S][B][A] most probable tokens, the token one higher being the second choice."""

    said: list[list[list[int]]]
    module: nn.Module = None  # type: ignore[assignment]
    token_ids: Tensor | None = None

    def guesses(self, lesson: Lesson, anchors_A: Tensor, random: torch.Generator | None) -> Iterator[Guess]:
        for said in self.said:
            best = torch.tensor(said)
            logits = torch.zeros(*best.shape, 12)
            logits.scatter_(-1, best[..., None], 2.0).scatter_(-1, best[..., None] + 1, 1.0)
            yield Guess(logits)


def test_validation_against_a_hand_count() -> None:
    # The text is 5 6 7 8 9; prompt 1. The target's greedy choices after each position are 6 7 1 9 2: after the third it would
    # have said 1, so there the text is not its own. Anchors 0, 1, 2, 3.
    lesson = Lesson(
        torch.tensor([[5, 6, 7, 8, 9]]), torch.tensor([5]), torch.zeros(1, 5, 0),
        torch.tensor([[[6], [7], [1], [9], [2]]]), torch.ones(1, 5, 1), prompt=1,
    )  # fmt: skip
    first = [7, 1, 9, 3]  # right: 7, 1, 9; wrong: 3 for 2. The text's own: 7 and 9; 1 is not (the text has 8)
    second = [8, 9, 2, 0]  # right: 9, 2; the text's own: 8 (not the target's 1) and 9; the last lies past the end
    third = [9, 3, 0, 0]  # right: 9; wrong: 3 for 2
    report = hits(Rigged([[first], [second], [third]]), lesson)
    assert report.counted_S.tolist() == [4, 3, 2]
    assert report.ranks_SR[:, 0].tolist() == [3, 2, 1]
    assert report.ranks_SR[0, 1].item() == 0
    assert report.alive_S.tolist() == [4, 2, 1]  # anchor 1's chain left the text for good; anchors 3 and 2 come to its end
    assert report.taken_S.tolist() == [3, 1, 1]
    figures = report.report()
    assert figures["top1"] == pytest.approx([3 / 4, 2 / 3, 1 / 2])
    assert figures["acceptance"] == [3 / 4, 1 / 2, 1]
    assert figures["efficiency"] == pytest.approx(1 + 3 / 4 + 3 / 8 + 3 / 8)


def test_ranks_are_counted_one_by_one() -> None:
    lesson = Lesson(
        torch.tensor([[5, 6, 7]]), torch.tensor([3]), torch.zeros(1, 3, 0),
        torch.tensor([[[6], [7], [8]]]), torch.ones(1, 3, 1), prompt=1,
    )  # fmt: skip
    found = hits(Rigged([[[6, 8]]]), lesson)  # the second choice of 6 is 7
    assert found.ranks_SR[0, :3].tolist() == [1, 1, 0]


def test_anchors_are_a_share_in_order_and_the_same_for_the_same_seed() -> None:
    lesson = lesson_for((), lengths=(44, 44))
    assert anchors(lesson).tolist() == list(range(2, 43))
    drawn = [anchors(lesson, 0.5, torch.Generator().manual_seed(seed)).tolist() for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert drawn[0] == sorted(set(drawn[0]))
    assert len(drawn[0]) == 20


def test_version_1_learns_the_first_guess_with_noise_and_its_distance_from_the_next_features() -> None:
    target = tiny("llama", num_hidden_layers=4)
    shape = shape_for(target.config, 1)
    head: Eagle = randomized(Eagle(shape))
    lesson = lesson_for(shape.features)
    places = anchors(lesson)
    drawn, quiet = (EagleStudent(head, target, 4, noise, 3.0) for noise in (0.5, 0.0))
    (used, *rest) = quiet.guesses(lesson, places, torch.Generator())
    assert not rest
    states = head(
        target.get_input_embeddings()(lesson.tokens_BT[:, 1:]), lesson.features_BTF[:, :-1], torch.arange(13)[None], None
    )[:, places]
    wanted = nn.functional.smooth_l1_loss(states, lesson.features_BTF[:, places + 1])
    torch.testing.assert_close(used.penalty, 3 * wanted)
    (noisy,) = drawn.guesses(lesson, places, torch.Generator().manual_seed(0))
    assert not torch.allclose(noisy.logits_BAV, used.logits_BAV)
    total, each = loss(quiet, lesson, places, torch.Generator(), 0.8)
    torch.testing.assert_close(total, each[0] + used.penalty)


def test_later_guesses_weigh_less() -> None:
    lesson = lesson_for((-1,))
    student = MedusaStudent(randomized(Medusa(MedusaShape(32, VOCABULARY, heads=3))))
    total, each = loss(student, lesson, anchors(lesson), torch.Generator(), 0.5)
    torch.testing.assert_close(total, (each * torch.tensor([1.0, 0.5, 0.25])).sum() / 1.75)
