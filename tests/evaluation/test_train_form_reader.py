"""The training script: it draws what the model reads, and a few steps on the CPU go through."""

import copy
import json
import re
import signal
import sys
from itertools import pairwise
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from vlcache_triton.apps.formreader import (
    TASKS,
    chat,
    draw_dialogue,
    draw_pages,
    encode_chats,
    load_form_reader,
    render,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks" / "accuracy"))

import form_batches
import form_words
import train_form_reader

VALUE = "\nWhat is the value of KAB? ASSISTANT: "
SETTINGS = {
    "seconds": 600.0,
    "max_steps": 2,
    "reserve": 0.0,
    "batch_size": 6,
    "text_length": 32,
    "learning_rate": 1e-3,
    "workers": 0,
    "checkpoint_every": 600.0,
    "eval_every": 600.0,
    "eval_pages": 1,
    "seed": 0,
    "suites": (),
}


@pytest.fixture(scope="module")
def start():
    """The shipped model with words as tokens, and its processor."""
    return train_form_reader.initial("shipped", "cpu")


@pytest.fixture(scope="module")
def settings(form_reader, tmp_path_factory):
    """To train the shipped model from, cut to one layer each: the steps are about the loop."""
    shipped, processor = form_reader
    config = copy.deepcopy(shipped.config)
    config.text_config.num_hidden_layers = config.vision_config.num_hidden_layers = 1
    model = type(shipped)(config)
    assert not model.load_state_dict(shipped.state_dict(), strict=False).missing_keys
    folder = tmp_path_factory.mktemp("shallow") / "model"
    train_form_reader.save(model, processor, folder)
    return {**SETTINGS, "init": str(folder)}


@pytest.fixture(scope="module")
def forms(start):
    return form_batches.Forms(start[1].tokenizer.get_vocab(), 6, 192, seed=0)


def test_frequent_words_are_tokens_and_texts_come_back(start, form_reader):
    tokenizer = start[1].tokenizer
    assert len(tokenizer(VALUE)["input_ids"]) == 12 < len(form_reader[1].tokenizer(VALUE).input_ids)
    texts = [VALUE, "USER: Whichever fields, the 7F3 formed of\n", " the thesis is this", ""]
    texts += [question.text for question in draw_dialogue(0, TASKS).questions]
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert form_words.encode(tokenizer.get_vocab(), text) == ids
    answers = [question.answer for question in draw_dialogue(0, TASKS).questions]
    assert [len(tokenizer(a)["input_ids"]) for a in answers] == [len(a) for a in answers]


def test_a_model_with_words_keeps_the_rows_that_it_had(start, form_reader):
    grown, shipped = start[0], form_reader[0]
    size = shipped.config.text_config.vocab_size
    assert grown.config.text_config.vocab_size == len(start[1].tokenizer.get_vocab()) > size
    for name, expected in shipped.state_dict().items():
        assert torch.equal(grown.state_dict()[name][: len(expected)], expected), name
    again = form_words.with_words(grown, start[1])
    assert again.tokenizer.get_vocab() == start[1].tokenizer.get_vocab()


def test_plain_pages_are_what_the_processor_makes_of_rendered_ones(start):
    """So that evaluations in training speak of the pages that users see."""
    processor = start[1]
    painter = train_form_reader.Painter(processor.image_processor, "cpu")
    dialogue = draw_dialogue("draw", ["value", "count"], num_pages=2)
    texts = [question.text for question in dialogue.questions]
    messages = chat([render(p) for p in dialogue.pages], texts, [dialogue.questions[0].answer])
    expected = encode_chats(processor, [messages])
    codes = np.stack([form_batches.page_codes(page) for page in dialogue.pages])
    pixels = painter(torch.from_numpy(codes), augment=False)
    torch.testing.assert_close(pixels, expected["pixel_values"], atol=1e-5, rtol=0)
    text = train_form_reader._text(processor, dialogue)
    inputs = train_form_reader.encode_texts(processor, [text])
    assert torch.equal(inputs["input_ids"], expected["input_ids"])


def test_a_drawn_batch_shows_what_the_renderer_shows(monkeypatch):
    """But for colours and noise."""
    monkeypatch.setattr(form_batches, "MAX_SHIFT", 0.0)
    monkeypatch.setattr(form_batches, "FORM_SHARE", 0.0)
    torch.manual_seed(0)
    (page,) = draw_dialogue("draw", ["value"]).pages
    cells = torch.tensor(form_batches.page_codes(page))[None]
    stamps = form_batches.draw_stamps()
    stamps = stamps._replace(glyphs=stamps.glyphs[:1])
    drawn = form_batches.draw_batch(cells, stamps, torch.zeros(3), torch.ones(3))[0].mean(0)
    rendered = torch.tensor(np.asarray(render(page).convert("L")), dtype=torch.float32) / 255
    drawn, rendered = (1 - x / x.max() for x in (drawn, rendered))
    correlation = torch.corrcoef(torch.stack([drawn.flatten(), rendered.flatten()]))[0, 1]
    assert correlation > 0.9


@pytest.mark.parametrize("num_pages", [1, 2, 3])
def test_a_batch_is_laid_out_as_the_chat_template_lays_it_out(start, forms, num_pages):
    processor = start[1]
    batch = forms.draw(Random(0), num_pages)
    n, length = 6 // num_pages, 2 + num_pages * (576 + 192)
    assert batch.cells.shape == (n, num_pages, 24, 24, 4)
    assert batch.input_ids.shape == batch.labels.shape == batch.weights.shape == (n, length)
    assert [(x.shape, x.dtype) for x in forms.blank(num_pages)] == [
        (x.shape, x.dtype) for x in batch
    ]
    for ids, labels, weights in zip(*batch[1:], strict=True):
        asked = labels != form_batches.IGNORED
        assert torch.equal(labels[asked], ids[asked]) and torch.equal(weights > 0, asked)
        text = processor.decode(ids[ids != 0])
        pieces = re.split(r"</s>USER: | ASSISTANT: |</s>$", text)[:-1]
        first = "<s>USER: " + "<image>" * (576 * num_pages) + "\n"
        assert pieces[0].startswith(first)
        questions, answers = [pieces[0].removeprefix(first), *pieces[2::2]], pieces[1::2]
        messages = chat([None] * num_pages, questions, answers[:-1])
        template = processor.apply_chat_template(messages, add_generation_prompt=True)
        whole = template + answers[-1] + "</s>"
        expected = train_form_reader.encode_texts(processor, [whole])["input_ids"][0]
        assert torch.equal(ids[: len(expected)], expected) and not ids[len(expected) :].any()
        assert processor.decode(ids[asked]) == "</s>".join(answers) + "</s>"


def test_the_answers_are_on_the_pages(forms):
    """Read back from the drawn characters: fields first to last, whatever fills the page."""
    for num_pages in (1, 2):
        batch = forms.draw(Random(1), num_pages)
        for cells, ids in zip(batch.cells, batch.input_ids, strict=True):
            words = ["".join(chr(32 + c) for c in cell).strip() for cell in cells.reshape(-1, 4)]
            fields = {}
            for i, word in enumerate(words):
                if word.endswith(":"):
                    fields[word[:-1]] = words[i + 1] + words[i + 2]
                    end = min(i + 4, i - i % 24 + 24)  # of the field, in its row
                    assert not any(w.islower() for w in words[i + 1 : end])
            inverse = {value: key for key, value in fields.items()}
            vocabulary = {i: token for token, i in forms.vocabulary.items()}
            text = "".join(vocabulary[i] for i in ids.tolist() if i not in (0, 1, 4))
            for question, answer in re.findall(r"([A-Z][^?.:]*[?.]) ASSISTANT: (.*?)</s>", text):
                keys, name = list(fields), question.split()[-1][:-1]
                if "What is" in question:
                    assert answer == fields[name]
                elif "has the value" in question:
                    assert answer == inverse[name]
                elif "after" in question:
                    assert answer == [*keys, "none"][keys.index(name) + 1]
                elif "many" in question:
                    assert answer == str(len(keys))
                else:
                    assert answer == " ".join(keys[:10])


def test_pages_vary_in_rows_and_in_what_fills_them(forms):
    rng = Random(2)
    cells = torch.cat([forms.draw(rng, 1).cells.flatten(0, 1) for _ in range(60)])
    used = cells[..., 0] > 0
    shares = used.float().mean((1, 2))
    assert shares.min() < 0.05 and shares.max() > 0.85
    rows = used.any(2).sum(1)
    assert rows.max() == 24 and (rows < 20).float().mean() > 0.2
    assert used.float().mean((0, 2)).min() > 0.1  # no row is always blank


def test_the_mix_is_the_one_that_is_asked_for(forms):
    tasks = [task for i in range(400) for task in form_batches.draw_tasks(Random(i), 12)]
    shares = {task: tasks.count(task) / len(tasks) for task in form_batches.TASK_WEIGHTS}
    assert 0.33 < shares["field"] < 0.45 and shares["value"] > 0.25 and shares["next"] > 0.12
    for i in range(50):
        drawn = form_batches.draw_tasks(Random(i), 12)
        assert drawn.count("list") <= 1 and drawn.count("count") <= 1
        assert "list" not in drawn or "next" not in drawn[drawn.index("list") :]
    assert sum(w for pages, w in form_batches.PAGE_WEIGHTS.items() if pages > 1) == pytest.approx(
        0.2
    )
    with pytest.raises(ValueError, match="batch_size: got 8"):
        form_batches.Forms(forms.vocabulary, 8, 192, 0)


def test_batches_of_another_seed_are_others(forms):
    first, again, other = (
        next(iter(form_batches.Forms(forms.vocabulary, 6, 32, seed))) for seed in (0, 0, 1)
    )
    assert all(map(torch.equal, first, again))
    assert not torch.equal(first.cells[0, 0], other.cells[0, 0])


def test_the_trained_forward_is_the_models(start):
    model, processor = start
    trainer = train_form_reader.Trainer(model)
    forms = form_batches.Forms(processor.tokenizer.get_vocab(), 6, 32, seed=1)
    batch = forms.draw(Random(0), 2)
    pixels = train_form_reader.Painter(processor.image_processor, "cpu")(batch.cells[:1])
    ids = batch.input_ids[:1]
    with torch.no_grad():
        hidden = trainer.write(trainer.see(pixels).reshape(1, 1152, -1), ids)
        expected = model(input_ids=ids, pixel_values=pixels).logits
        torch.testing.assert_close(model.lm_head(hidden), expected, atol=1e-3, rtol=1e-3)


def test_a_few_steps_on_the_cpu(tmp_path, settings, form_reader):
    settings = {**settings, "suites": train_form_reader.SUITES[2:3]}
    entries = train_form_reader.train(tmp_path, **settings)
    steps, last = entries[:2], entries[2:]
    assert [entry["step"] for entry in entries] == [1, 2, 2, 2]
    assert steps[0]["reading_loss"] == pytest.approx(np.log(95), abs=1e-3)  # a head from zero
    assert steps[0]["learning_rate"] == 1e-3 / train_form_reader.WARMUP_STEPS
    assert steps[1]["progress"] == 0.5
    assert last[0]["saved"] and last[1]["final"] and set(last[1]["exact"]) == {"count"}
    log = (tmp_path / "train.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in log] == entries
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["model"]
    saved, processor = load_form_reader(tmp_path / "model")
    assert saved.config.text_config.vocab_size == len(processor.tokenizer.get_vocab())
    assert len(processor.tokenizer(VALUE)["input_ids"]) == 12
    before = dict(form_reader[0].named_parameters())
    changed = []
    for name, p in saved.named_parameters():
        assert torch.isfinite(p).all()
        if not torch.equal(p[: len(before[name])], before[name]):
            changed.append(name)
    assert any("vision" in n for n in changed) and any("lm_head" in n for n in changed)


def test_a_signal_saves_and_ends(tmp_path, settings, monkeypatch):
    draw = form_batches.Forms.draw

    def signalled(self, rng, num_pages):
        signal.raise_signal(signal.SIGTERM)
        return draw(self, rng, 1)

    monkeypatch.setattr(form_batches.Forms, "draw", signalled)
    before = signal.getsignal(signal.SIGTERM)
    entries = train_form_reader.train(tmp_path, **{**settings, "max_steps": None})
    assert entries[-1] == {**entries[-1], "step": 1, "saved": True}  # and no evaluation
    assert signal.getsignal(signal.SIGTERM) is before
    load_form_reader(tmp_path / "model")


def test_checkpoints_are_models_and_training_goes_on_from_them(tmp_path, settings, monkeypatch):
    saved = []
    save = train_form_reader.save

    def spy(model, processor, folder):
        save(model, processor, folder)
        assert model.dtype == torch.float32
        saved.append(sorted(path.name for path in folder.parent.iterdir()))

    monkeypatch.setattr(train_form_reader, "save", spy)
    settings = {**settings, "max_steps": 1, "checkpoint_every": 0.0}
    train_form_reader.train(tmp_path / "a", **settings)
    assert saved == [["model", "train.jsonl"]] * 2
    settings["init"] = str(tmp_path / "a" / "model")
    assert train_form_reader.train(tmp_path / "b", **settings)[-1]["final"]


def test_from_scratch(form_reader):
    model, processor = train_form_reader.initial("scratch", "cpu")
    assert len(processor.tokenizer(VALUE)["input_ids"]) == 12
    shipped = form_reader[0].state_dict()
    name = "lm_head.weight"
    assert not torch.equal(model.state_dict()[name][: len(shipped[name])], shipped[name])


def test_a_form_has_boxes_and_a_title_in_a_blank_row(monkeypatch):
    """Boxes stand where Pillow draws a rectangle round a value's two cells."""
    monkeypatch.setattr(form_batches, "FORM_SHARE", 1.0)
    cells = torch.zeros(24, 24, 24, 4, dtype=torch.uint8)
    image = Image.new("L", (672, 672), 0)
    for row, column in ((3, 0), (3, 4), (5, 21)):  # side by side, and at the edge
        cells[:, row, column] = codes("KAB:")
        left, top = (column + 1) * 28 - 2, row * 28 + 2
        ImageDraw.Draw(image).rectangle((left, top, left + 59, top + 23), outline=1)
    cells[12:, 1, 5] = codes("WORD")  # no room for a title
    stamps = form_batches.draw_stamps()
    stamps = stamps._replace(glyphs=torch.zeros_like(stamps.glyphs))
    torch.manual_seed(0)
    ink = form_batches.vary_ink(cells, stamps)[:, 0]
    strength = ink[:, 56:].amax((1, 2))
    boxed = strength > 0
    assert 0.4 < boxed.float().mean() < 1
    assert strength[boxed].min() >= 0.15 and strength.max() <= 0.5 and strength.unique().numel() > 9
    expected = torch.tensor(np.asarray(image)) * strength[:, None, None]
    assert torch.equal(ink[:, 56:], expected[:, 56:])
    titled = ink[:, 28:56].flatten(1).any(1)
    assert 6 <= titled[:12].sum() < 12 and not titled[12:].any() and not ink[:, :28].any()


def test_labels_of_forms_are_bold_and_small_words_paler(monkeypatch):
    monkeypatch.setattr(form_batches, "FORM_SHARE", 1.0)
    cells = torch.zeros(24, 24, 24, 4, dtype=torch.uint8)
    for column, word in ((4, "KAB:"), (6, "7F31"), (12, "kab")):
        cells[:, 9, column, : len(word)] = codes(word)
    glyphs, _, titles = stamps = form_batches.draw_stamps()
    stamps = stamps._replace(boxes=torch.zeros(6, 28, 28), titles=torch.zeros_like(titles))
    torch.manual_seed(0)
    ink = form_batches.vary_ink(cells, stamps)[:, 0, 9 * 28 : 10 * 28].unflatten(2, (24, 28))
    drawn = {
        word: glyphs[:, codes(word).long()].transpose(1, 2).flatten(2)
        for word in ("KAB:", "7F31", "kab ")
    }
    bold = (ink[:, :, 4] == drawn["KAB:"][form_batches.BOLD]).all((1, 2))
    assert 0.6 < bold.float().mean() < 1
    own = torch.stack([(ink[:, :, 6] == font).all((1, 2)) for font in drawn["7F31"]], 1)
    assert own.sum(1).eq(1).all() and own.any(0).all()
    full = drawn["kab "].amax((1, 2))[own.int().argmax(1)]
    paler = ink[:, :, 12].amax((1, 2)) / full
    assert 0.45 <= paler.min() < 0.6 and 0.9 < paler.max() <= 1


def codes(word):
    return torch.tensor([ord(c) - 32 for c in word], dtype=torch.uint8)


def test_some_pages_are_laid_out_in_columns():
    rng = Random(0)
    for i in range(60):
        (page,) = draw_pages(rng, fields=(1, 18), clutter=0)
        laid_out, free = form_batches.in_columns(rng, page)
        words = [
            (row, column)
            for row in range(24)
            for column in range(24)
            if laid_out.cells[row][column].endswith(":")
        ]
        assert [laid_out.cells[r][c] for r, c in words] == [f.key + ":" for f in page.fields]
        assert ["".join(laid_out.cells[r][c + 1 : c + 3]) for r, c in words] == [
            f.value for f in page.fields
        ]
        lines, offsets = ({x[i] for x in words} for i in (0, 1))
        assert len(words) <= len(lines) * len(offsets) and len(offsets) <= 6
        assert len({later - line for line, later in pairwise(sorted(lines))}) <= 1
        assert not free[list(lines)].any() and not free[1]
