"""examples/engine.py answers as the adapter does, whatever else is in its batch."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from vlcache_triton.apps.formreader import (
    chat,
    draw_dialogue,
    encode_chats,
    load_form_reader,
    render,
)
from vlcache_triton.integrations.transformers import vl_cache

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))  # for the engine's own import of form_reader
spec = importlib.util.spec_from_file_location("example_engine", EXAMPLES / "engine.py")
engine = sys.modules["example_engine"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(engine)
Engine, FormReader, Request = engine.Engine, engine.FormReader, engine.Request

TASKS = ("list", "value", "next")
MAX_NEW_TOKENS = (10, 9, 3)  # the second ends by itself


class ShortSighted(FormReader):
    """Two layers, and a tower that sees the first `VISUAL_TOKENS` patches: for the interpreter."""

    VISUAL_TOKENS = 40

    def __init__(self, device: torch.device | str = "cpu") -> None:
        super().__init__(device)
        self.num_layers = 2

    def _see(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return super()._see(pixel_values)[200 : 200 + self.VISUAL_TOKENS]


@pytest.fixture(scope="module")
def asked():
    """The adapter's model and processor, and a chat a task."""
    chats = []
    for task in TASKS:
        dialogue = draw_dialogue(f"engine-{task}", [task])
        chats.append(chat([render(dialogue.pages[0])], [dialogue.questions[0].text]))
    return *load_form_reader(), chats


def requests_for(asked, max_new_tokens=MAX_NEW_TOKENS):
    """As many of the chats as there are lengths."""
    _, processor, chats = asked
    inputs = [encode_chats(processor, [chats[i]]) for i in range(len(max_new_tokens))]
    return [
        Request(x["input_ids"][0], x["pixel_values"], n)
        for x, n in zip(inputs, max_new_tokens, strict=True)
    ]


def pages_in_use(running):
    return len(running.k) - 1 - len(running.free_pages)


@pytest.mark.parametrize("budget", [1.0, 0.6, 0.4])
def test_it_answers_as_the_adapter_does(asked, budget):
    model, processor, chats = asked
    inputs = encode_chats(processor, chats)  # all in one batch, padded on the left
    with vl_cache(model, budget=budget, backend="reference") as session:
        out = model.generate(**inputs, max_new_tokens=max(MAX_NEW_TOKENS), do_sample=False)
    expected = out[:, inputs["input_ids"].shape[1] :].tolist()

    requests = requests_for(asked)
    running = Engine(FormReader(), budget, backend="reference", num_slots=2)
    running.generate(requests)
    for request, tokens in zip(requests, expected, strict=True):
        n = len(request.answer)
        assert request.answer == tokens[:n]
        assert n == request.max_new_tokens or tokens[n - 1] == model.config.eos_token_id
    assert len({len(request.answer) for request in requests}) > 1, "all left the batch at once"
    if budget < 1:
        kept = torch.tensor([request.kept for request in requests]).T
        assert kept.tolist() == session.report().kept
    assert pages_in_use(running) == 0
    assert not running.seqused_k.any() and not running.block_table.any()


def short_requests(asked):
    """Of unequal length, for ShortSighted."""
    requests = requests_for(asked, (5, 3, 3))
    for request in requests:
        visual = (request.input_ids == asked[0].config.image_token_id).nonzero()[:, 0]
        first, last = int(visual[0]), int(visual[-1])
        parts = (
            request.input_ids[: first + ShortSighted.VISUAL_TOKENS],
            request.input_ids[last + 1 :],
        )
        request.input_ids = torch.cat(parts)
    return requests


def answer_short(asked, backend, device="cpu"):
    requests = short_requests(asked)
    Engine(
        ShortSighted(device),
        0.4,
        backend=backend,
        num_slots=2,
        num_pages=512,
        page_size=8,
        max_seqlen_k=128,
    ).generate(requests)
    return requests


def test_the_kernels_answer_as_the_reference_does(asked):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    expected, got = answer_short(asked, "reference"), answer_short(asked, "triton", device)
    assert [x.answer for x in got] == [x.answer for x in expected]
    assert [x.kept for x in got] == [x.kept for x in expected]
    assert [len(x.answer) for x in got] == [5, 2, 3]  # the second has met its end


def test_a_pool_for_one_request_serves_them_one_by_one(asked):
    """What is too little for two is waited for; what would never do is refused before any work."""
    alone, together = short_requests(asked), short_requests(asked)
    small = dict(backend="reference", page_size=8, max_seqlen_k=128)
    Engine(ShortSighted(), 0.4, num_pages=512, **small).generate(alone)
    running = Engine(ShortSighted(), 0.4, num_pages=30, **small)
    most = []
    step = running.step
    running.step = lambda: (most.append(int(running.is_taken.sum())), step())
    running.generate(together)
    assert [x.answer for x in together] == [x.answer for x in alone]
    assert set(most) == {running.num_kv_heads}, "two requests shared a pool that is for one"

    requests = short_requests(asked)
    with pytest.raises(ValueError, match="num_pages"):
        Engine(ShortSighted(), 0.4, num_pages=8, **small).generate(requests)
    requests[2].max_new_tokens = 1000
    with pytest.raises(ValueError, match="max_new_tokens: got 1000"):
        Engine(ShortSighted(), 0.4, num_pages=30, **small).generate(requests)
    requests[2] = Request(torch.tensor([1, 5, 6]), requests[2].pixel_values, 3)
    with pytest.raises(ValueError, match="input_ids"):
        Engine(ShortSighted(), 0.4, num_pages=30, **small).generate(requests)
    assert not any(request.answer for request in requests)


@pytest.mark.gpu
@pytest.mark.parametrize("budget", [1.0, 0.6, 0.4])
def test_replayed_steps_answer_as_eager_ones_do(asked, budget):
    requests, expected = requests_for(asked), requests_for(asked)
    running = Engine(FormReader("cuda"), budget, num_slots=2)
    assert running.step != running._step, "its step was not captured"
    running.generate(requests)
    eager = Engine(FormReader("cuda"), budget, num_slots=2)
    eager.step = eager._step
    eager.generate(expected)
    assert [x.answer for x in requests] == [x.answer for x in expected]
    on_host = requests_for(asked)
    Engine(FormReader(), budget, backend="reference").generate(on_host)
    assert [x.answer for x in requests] == [x.answer for x in on_host]


def test_its_script_runs(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["engine.py", "--budget", "0.6"])
    engine.main()
    lines = capsys.readouterr().out.strip().splitlines()
    right = [
        line for line in lines if line.split("?")[1].split()[0] == line.rsplit(None, 1)[1][:-1]
    ]
    assert len(lines) == 3 and right == lines
