"""The shipped weights load offline and read pages."""

import torch

from vlcache_triton.apps.formreader import (
    MAX_ANSWER_TOKENS,
    chat,
    draw_dialogue,
    encode_chats,
    render,
)

NUM_PAGES = 64
LONGEST_VALUE = 8


def replies(form_reader, chats, max_new_tokens):
    model, processor = form_reader
    inputs = encode_chats(processor, chats)
    with torch.inference_mode():
        ids = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    new = ids[:, inputs["input_ids"].shape[1] :]
    return processor.batch_decode(new, skip_special_tokens=True)


def test_the_prompt_is_the_one_the_model_was_trained_on(form_reader):
    _, processor = form_reader
    messages = chat(["page 1", "page 2"], ["How many?", "Which?"], ["3"])
    assert processor.apply_chat_template(messages, add_generation_prompt=True) == (
        "<s>USER: <image><image>\nHow many? ASSISTANT: 3</s>USER: Which? ASSISTANT: "
    )
    dialogue = draw_dialogue(0, ["count"])
    messages = chat([render(dialogue.pages[0])], [dialogue.questions[0].text])
    ids = encode_chats(processor, [messages])["input_ids"][0].tolist()
    visual = processor.tokenizer.convert_tokens_to_ids("<image>")
    assert ids.count(visual) == 24 * 24
    text = "<s>USER: \nHow many fields are there? ASSISTANT: "
    assert processor.decode([i for i in ids if i != visual]) == text


def test_it_reads_at_least_80_percent_of_64_fixed_pages_exactly(form_reader):
    """Value look-ups on pages of 6 to 12 fields, with the full cache."""
    dialogues = [draw_dialogue(f"page-{i}", ["value"]) for i in range(NUM_PAGES)]
    answers = []
    for start in range(0, NUM_PAGES, 16):
        batch = dialogues[start : start + 16]
        chats = [chat([render(d.pages[0])], [d.questions[0].text]) for d in batch]
        answers += replies(form_reader, chats, LONGEST_VALUE + 1)
    right = sum(a == d.questions[0].answer for a, d in zip(answers, dialogues, strict=True))
    assert len(answers) == NUM_PAGES
    assert right >= 0.8 * NUM_PAGES


def test_it_counts_lists_and_follows_over_turns(form_reader):
    dialogue = draw_dialogue("page-1", ["count", "list", "value"])
    images = [render(page) for page in dialogue.pages]
    texts = [question.text for question in dialogue.questions]
    answers: list[str] = []
    for turn in range(len(texts)):
        messages = chat(images, texts[: turn + 1], answers)
        answers += replies(form_reader, [messages], MAX_ANSWER_TOKENS)
    assert answers == [question.answer for question in dialogue.questions]


def test_it_takes_several_images(form_reader):
    _, processor = form_reader
    dialogue = draw_dialogue(0, ["count"], num_pages=2)
    images = [render(page) for page in dialogue.pages]
    inputs = encode_chats(processor, [chat(images, [dialogue.questions[0].text])])
    visual = processor.tokenizer.convert_tokens_to_ids("<image>")
    assert (inputs["input_ids"] == visual).sum() == 2 * 24 * 24
    assert len(inputs["pixel_values"]) == 2
