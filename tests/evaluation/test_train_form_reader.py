"""The training script: it draws what the model reads, and a few steps on the CPU go through."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from vlcache_triton.formreader import draw_dialogue, render

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks" / "accuracy"))

import form_batches
import train_form_reader


def test_a_drawn_batch_shows_what_the_renderer_shows(monkeypatch):
    """But for colours and noise."""
    monkeypatch.setattr(form_batches, "MAX_SHIFT", 0.0)
    torch.manual_seed(0)
    (page,) = draw_dialogue("draw", ["value"]).pages
    cells = torch.tensor(form_batches.page_codes(page))[None]
    glyphs = form_batches.draw_glyphs()[:1]
    drawn = form_batches.draw_batch(cells, glyphs, torch.zeros(3), torch.ones(3))[0].mean(0)
    rendered = torch.tensor(np.asarray(render(page).convert("L")), dtype=torch.float32) / 255
    drawn, rendered = (1 - x / x.max() for x in (drawn, rendered))
    correlation = torch.corrcoef(torch.stack([drawn.flatten(), rendered.flatten()]))[0, 1]
    assert correlation > 0.9


def test_a_batch_is_laid_out_as_the_chat_template_lays_it_out(form_reader):
    _, processor = form_reader
    vocabulary = processor.tokenizer.get_vocab()
    batch = next(iter(form_batches.Forms(vocabulary, 3, 160, seed=0)))
    assert batch.input_ids.shape == batch.labels.shape == (3, 7 + 576 + 160)
    assert batch.cells.shape == (3, 24, 24, 4)
    for ids, labels in zip(batch.input_ids, batch.labels, strict=True):
        assert (ids == vocabulary["<image>"]).nonzero().flatten().tolist() == list(range(7, 583))
        text = processor.decode(ids[ids != vocabulary["<image>"]])
        assert text.startswith("<s>USER: \n") and "? ASSISTANT: " in text
        asked = labels != form_batches.IGNORED
        assert torch.equal(labels[asked], ids[asked])
        answers = processor.decode(ids[asked]).split("</s>")[:-1]
        assert len(answers) == text.count(" ASSISTANT: ") >= 2
        for answer in answers:
            assert f" ASSISTANT: {answer}</s>" in text


def test_batches_of_another_seed_are_others(form_reader):
    vocabulary = form_reader[1].tokenizer.get_vocab()
    first, again, other = (
        next(iter(form_batches.Forms(vocabulary, 1, 160, seed))).input_ids for seed in (0, 0, 1)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_the_trained_forward_is_the_models(form_reader):
    model, processor = form_reader
    trainer = train_form_reader.Trainer(model)
    batch = next(iter(form_batches.Forms(processor.tokenizer.get_vocab(), 2, 120, seed=1)))
    pixels = torch.randn(2, 3, 672, 672, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        hidden = trainer.write(trainer.see(pixels), batch.input_ids)
        expected = model(input_ids=batch.input_ids, pixel_values=pixels).logits
        torch.testing.assert_close(model.lm_head(hidden), expected, atol=1e-3, rtol=1e-3)


def test_a_few_steps_on_the_cpu(tmp_path, form_reader):
    entries = train_form_reader.train(
        tmp_path,
        seconds=600.0,
        max_steps=2,
        batch_size=2,
        text_length=96,
        learning_rate=8e-4,
        workers=0,
        eval_every=100,
        eval_pages=2,
        seed=0,
    )
    assert [entry["step"] for entry in entries] == [1, 2, 2]
    assert entries[0]["loss"] < 1.0  # it goes on from weights that read such pages
    assert entries[0]["reading_loss"] == pytest.approx(np.log(95), abs=1e-3)  # a head from zero
    assert entries[-1]["final"] and 0 <= entries[-1]["exact"] <= 1
    log = (tmp_path / "train.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in log] == entries
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

    saved = LlavaForConditionalGeneration.from_pretrained(tmp_path)
    LlavaProcessor.from_pretrained(tmp_path)
    before = dict(form_reader[0].named_parameters())
    assert all(torch.isfinite(p).all() for p in saved.parameters())
    changed = [
        name for name, p in saved.named_parameters() if not torch.equal(p.float(), before[name])
    ]
    assert any("vision" in n for n in changed) and any("lm_head" in n for n in changed)
