"""Heads in every layout that forerun reads, served by vLLM: the drafts it keeps are those that our own engine keeps.

A head that were read wrongly, or given other layers of the target, would still write the same texts and be accepted less.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from forerun.build import Models, build
from forerun.config import EMBEDDED, Variant, parse
from forerun.heads import Eagle, EagleShape, MLPShape, MLPSpeculator, formats
from forerun.heads.store import load, save
from forerun.model import ASSETS
from forerun.types import Completion, Request, Sampling, UserError, complete
from models import redraw, wide_headed

pytestmark = pytest.mark.filterwarnings("ignore")  # of vLLM's own
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # before anything imports vLLM
VOCABULARY, HIDDEN, WIDE, K, NEW = 64, 64, 96, 3, 60
IDS = "eagle_aux_hidden_state_layer_ids"


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> LlamaForCausalLM:
    """One layer over embeddings that are of norm 1 already."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = wide_headed(vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=WIDE)
        redraw(model, 1.5)
        embeddings = model.get_input_embeddings().weight
        embeddings.copy_(embeddings / embeddings.square().mean(-1, keepdim=True).sqrt())
    model.save_pretrained(place := tmp_path_factory.mktemp("target"))
    model.name_or_path = str(place)
    return model


def head_for(target: LlamaForCausalLM) -> Eagle:
    """The target's own layer on the next token's embedding, disturbed by the state before it and by a bias."""
    [layer] = target.model.layers
    head = Eagle(EagleShape(HIDDEN, VOCABULARY, WIDE, 2, 1, 32, version=1)).requires_grad_(False)
    draw = torch.Generator().manual_seed(5)
    head.attention.load_state_dict(layer.self_attn.state_dict())
    head.mlp.load_state_dict(layer.mlp.state_dict())
    states = torch.randn(HIDDEN, HIDDEN, generator=draw) * (0.1 / HIDDEN**0.5)
    head.join.weight.copy_(torch.cat([torch.eye(HIDDEN), states], 1))
    head.join.bias.copy_(torch.randn(HIDDEN, generator=draw) * 0.3)
    return head


def drafted(
    target: str, kind: str, head: Path, backend: str, prompts: list[list[int]], models: Models, speculation: Any = None
) -> list[Completion]:
    options = {"speculative_config": speculation} if speculation else {}
    settings = {
        "model": {"path": target, "dtype": "float32"},
        "drafter": {"kind": kind, "path": str(head), "k": K} | ({"tree": "chain"} if kind == "eagle" else {}),
        "engine": {"rows": 3, "capacity": 128},
        "backend": backend,
        "vllm": {"enforce_eager": True, "kv_cache_memory_bytes": 64 << 20, "options": options},
    }
    asked = [Request(str(i), tuple(prompt), Sampling(max_new=NEW, ignore_eos=True)) for i, prompt in enumerate(prompts)]
    return complete(build(parse(Variant, settings, "test"), models), asked)


def kept(completions: list[Completion]) -> list[list[int]]:
    """Of each round but the last, which vLLM drafts in full where our engine stops at the limit."""
    return [[one.accepted for one in completion.rounds[:-1]] for completion in completions]


def same(target: str, head: Path, prompts: list[list[int]], models: Models) -> list[int]:
    """Drafts kept in each round, which both engines tell alike, as they do the texts."""
    ours, theirs = (drafted(target, "eagle", head, backend, prompts, models) for backend in ("forerun", "vllm"))
    assert [one.tokens for one in ours] == [one.tokens for one in theirs]
    assert kept(ours) == kept(theirs)
    return [number for rounds in kept(theirs) for number in rounds]


@pytest.mark.parametrize("layout", ["own", "eagle", "speculators"])
def test_heads_of_version_1_keep_their_bias(layout: str, target: LlamaForCausalLM, tmp_path: Path) -> None:
    head = head_for(target)
    save(head, tmp_path / "own")
    if layout != "own":
        formats.write(head, tmp_path / layout, layout)
    prompts = torch.randint(1, VOCABULARY, (3, 8), generator=torch.Generator().manual_seed(1)).tolist()
    rounds = same(target.name_or_path, tmp_path / layout, prompts, Models())
    assert 0.2 * K < sum(rounds) / len(rounds) < 0.9 * K, "a head that is always or never right would show nothing"


@pytest.fixture(scope="module")
def models() -> Models:
    return Models()


@pytest.fixture(scope="module")
def texts(models: Models) -> list[list[int]]:
    tokenizer = models.words(parse(Variant, {}, "test").model).tokenizer
    assert tokenizer is not None
    return [tokenizer(text)["input_ids"] for text in ("Once upon a time, a small robot", "1. Wash the apples.\n2. Cut the")]


@pytest.mark.parametrize("layout", ["eagle3", "speculators"])
def test_heads_of_version_3_read_the_same_layers(layout: str, models: Models, texts: list[list[int]], tmp_path: Path) -> None:
    """Each layout counts them in its own way, and vLLM does so in a third where the project's own has them."""
    formats.write(load(ASSETS / "eagle")[0], tmp_path / layout, layout)
    assert sum(same(EMBEDDED, tmp_path / layout, texts, models)) > 10


@pytest.mark.parametrize("off", [-1, 0, 1])
def test_a_layer_beside_would_be_seen(off: int, models: Models, texts: list[list[int]], tmp_path: Path) -> None:
    """What the test above has to see: vLLM alone is given a head that reads the layers beside."""
    folder = tmp_path / "head"
    formats.write(load(ASSETS / "eagle")[0], folder, "speculators")
    settings = json.loads((folder / "config.json").read_text())
    settings[IDS] = [number + off for number in settings[IDS]]
    (folder / "config.json").write_text(json.dumps(settings))
    ours = drafted(EMBEDDED, "eagle", Path(EMBEDDED), "forerun", texts, models)
    theirs = drafted(EMBEDDED, "eagle", Path(EMBEDDED), "vllm", texts, models, {"model": str(folder)})
    assert (kept(ours) == kept(theirs)) == (off == 0)


def test_heads_that_vllm_has_no_place_for_are_refused(target: LlamaForCausalLM, tmp_path: Path) -> None:
    save(MLPSpeculator(MLPShape(HIDDEN, VOCABULARY, heads=K)), tmp_path / "mlp")
    with pytest.raises(UserError, match=r"^vLLM refuses this: .*MLPSpeculator.* not supported") as caught:
        drafted(target.name_or_path, "mlp", tmp_path / "mlp", "vllm", [[1, 2]], Models())
    assert len(str(caught.value)) < 400, "vLLM lists all that it supports"
