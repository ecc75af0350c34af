"""The lmms-eval model answers as `model.generate` does inside `vl_cache`.

lmms-eval pulls a CUDA torch and a hundred packages, so that stand-ins are imported in its place:
the few names of lmms-eval 0.7.3 that the model touches, with the signatures they have there.
"""

import importlib
import inspect
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from vlcache_triton import VLCacheConfig
from vlcache_triton.apps.formreader import chat, draw_dialogue, encode_chats, render
from vlcache_triton.apps.formreader.model import WEIGHTS
from vlcache_triton.integrations.transformers import vl_cache
from vlcache_triton.recipe.policies import VL_CACHE, snapkv

MODULE = "vlcache_triton.integrations.lmms_eval.model"
TASK, SPLIT, MAX_NEW_TOKENS = "forms", "test", 9


class CacheHook:
    def __init__(self, cachinglm=None) -> None:
        self.seen = []

    def add_partial(self, attr, req, res) -> None:
        self.seen.append((attr, req, res))


class Lmms:
    """lmms_eval.api.model.lmms"""

    is_simple = True

    def __init__(self) -> None:
        self._rank = 0
        self._world_size = 1
        self.cache_hook = CacheHook(None)
        self.task_dict = {}

    @classmethod
    def create_from_arg_string(cls, arg_string, additional_config=None):
        raise AssertionError("the tests hand the arguments over themselves")


def manifest(model_id, simple_class_path=None, chat_class_path=None, aliases=()):
    return SimpleNamespace(model_id=model_id, simple_class_path=simple_class_path)


def module(name, **members):
    made = ModuleType(name)
    vars(made).update(members)
    return made


@pytest.fixture(scope="module")
def lmms_model():
    """(the model's module, what it logged)"""
    logged = []
    stand_ins = [
        module("lmms_eval"),
        module("lmms_eval.api"),
        module("lmms_eval.api.model", lmms=Lmms),
        module("lmms_eval.models"),
        module("lmms_eval.models.registry_v2", ModelManifest=manifest),
        module("loguru", logger=SimpleNamespace(info=logged.append)),
    ]
    with pytest.MonkeyPatch.context() as patch:
        for stand_in in stand_ins:
            patch.setitem(sys.modules, stand_in.__name__, stand_in)
        patch.delenv("WORLD_SIZE", raising=False)
        yield SimpleNamespace(module=importlib.import_module(MODULE), logged=logged)
        del sys.modules[MODULE]


@pytest.fixture(scope="module")
def forms():
    """Documents of a local task."""
    dialogues = [draw_dialogue(f"test-value-{i}", ["value"]) for i in range(3)]
    return [
        {"image": render(d.pages[0]), "question": d.questions[0].text, "answer": d.questions[0]}
        for d in dialogues
    ]


def make(lmms_model, **arguments):
    return lmms_model.module.VLCacheModel(
        **{"pretrained": str(WEIGHTS), "dtype": "float32", "device": "cpu", **arguments}
    )


def ask(model, docs, options=None, context=None, visuals=lambda doc: [doc["image"]]):
    """What lmms-eval's evaluator does with a task that generates."""
    model.task_dict[TASK] = {SPLIT: docs}
    options = {"max_new_tokens": MAX_NEW_TOKENS} if options is None else options
    return model.generate_until(
        [
            SimpleNamespace(args=(context or doc["question"], options, visuals, i, TASK, SPLIT))
            for i, doc in enumerate(docs)
        ]
    )


def expected(form_reader, docs, config, policy=VL_CACHE):
    model, processor = form_reader
    answers = []
    with vl_cache(model, config, policy=policy):
        for doc in docs:
            inputs = encode_chats(processor, [chat([doc["image"]], [doc["question"]])])
            tokens = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
            new = tokens[0, inputs["input_ids"].shape[1] :]
            answers.append(processor.decode(new, skip_special_tokens=True).strip())
    return answers


@pytest.mark.parametrize(
    ("arguments", "config", "policy"),
    [
        ({}, VLCacheConfig(budget=0.1), VL_CACHE),
        ({"budget": 0.2, "policy": "snapkv"}, VLCacheConfig(budget=0.2), snapkv()),
        ({"budget": 0.2, "policy": "tuned"}, VLCacheConfig.tuned(budget=0.2), VL_CACHE),
        (
            {"budget": 60, "allocation": "uniform"},
            VLCacheConfig(budget=60, allocation="uniform"),
            VL_CACHE,
        ),
    ],
)
def test_answers_are_those_of_generate_within_vl_cache(
    lmms_model, form_reader, forms, arguments, config, policy
):
    model = make(lmms_model, **arguments)
    answers = ask(model, forms)
    assert answers == expected(form_reader, forms, config, policy)
    assert [(attr, res) for attr, _, res in model.cache_hook.seen] == [
        ("generate_until", answer) for answer in answers
    ]
    share = config.budget if isinstance(config.budget, float) else 60 / 610
    assert model.kept_shares == pytest.approx([share] * len(forms), rel=0.02)
    mean = sum(model.kept_shares) / len(forms)
    assert lmms_model.logged[-1] == (
        f"vlcache: kept {mean:.4f} of the prompts' KV bytes, the mean of 3 prompts"
        f" (policy {arguments.get('policy', 'vl_cache')}, budget {config.budget})"
    )


def test_the_full_cache_answers_right_and_keeps_everything(lmms_model, forms):
    model = make(lmms_model, policy="full")
    answers = ask(model, forms, {"max_new_tokens": MAX_NEW_TOKENS, "temperature": 0, "top_p": 1.0})
    assert answers == [doc["answer"].answer for doc in forms]
    assert model.kept_shares == [1.0] * len(forms)


def test_a_picture_is_read_as_the_command_line_reads_it(lmms_model, forms):
    """16-bit grey, and a photograph on its side: both used to be answered wrongly."""
    model = make(lmms_model, policy="full")
    (doc,) = forms[:1]
    grey = np.asarray(doc["image"].convert("L")).astype(np.uint16) * 257
    turned = doc["image"].transpose(Image.Transpose.ROTATE_90)
    turned.getexif()[0x0112] = 6  # to be shown a quarter clockwise
    expected = model.encode([doc["image"].convert("L")], "?")["pixel_values"]
    assert torch.equal(model.encode([Image.fromarray(grey)], "?")["pixel_values"], expected)
    expected = model.encode([doc["image"]], "?")["pixel_values"]
    assert torch.equal(model.encode([turned], "?")["pixel_values"], expected)


def test_a_prompt_without_images_is_left_whole(lmms_model, forms):
    model = make(lmms_model)
    assert len(ask(model, forms[:1], visuals=lambda doc: [])) == 1
    assert model.kept_shares == [1.0]


def test_answers_end_before_the_first_until(lmms_model, forms):
    model = make(lmms_model, policy="full")
    (whole,) = ask(model, forms[:1])
    options = {"max_new_tokens": MAX_NEW_TOKENS, "until": ["\n\n", whole[1]]}
    assert ask(model, forms[:1], options) == [whole[: whole.index(whole[1])]]
    assert options["until"] == ["\n\n", whole[1]]  # the requests of a task share their options
    assert len(ask(model, forms[:1], {"max_new_tokens": 1, "until": "#"})[0]) == 1


@pytest.mark.parametrize(
    ("options", "arguments", "until"),
    [
        ({}, {"max_new_tokens": 1024, "num_beams": 1, "do_sample": False}, []),
        (
            {"max_new_tokens": 32, "temperature": 0, "top_p": 1.0, "do_sample": True, "until": "a"},
            {"max_new_tokens": 32, "num_beams": 1, "do_sample": False},
            ["a"],
        ),
        (
            {"temperature": 0.7, "top_p": 0.9, "num_beams": 2},
            {
                "max_new_tokens": 1024,
                "num_beams": 2,
                "do_sample": True,
                "temperature": 0.7,
                "top_p": 0.9,
            },
            [],
        ),
        (
            {"temperature": 0.7, "do_sample": False},
            {"max_new_tokens": 1024, "num_beams": 1, "do_sample": False},
            [],
        ),
    ],
)
def test_a_tasks_options_become_arguments_of_generate(lmms_model, options, arguments, until):
    assert lmms_model.module._generation(options) == (arguments, until)


def test_lmms_eval_finds_it(lmms_model):
    """By its entry point, which imports lmms-eval only when it is called."""
    (entry,) = entry_points(group="lmms_eval.models", name="vlcache")
    found = entry.load()()
    assert found.model_id == "vlcache"
    name = found.simple_class_path.rpartition(".")
    model = getattr(importlib.import_module(name[0]), name[2])
    assert issubclass(model, Lmms) and model.is_simple
    # What lmms-eval hands over beside --model_args.
    assert {"batch_size", "max_batch_size", "device"} <= set(inspect.signature(model).parameters)
    code = f"import sys, {entry.module}; assert 'lmms_eval' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"policy": "snap"}, "policy: got 'snap'"),
        ({"budget": 1.5}, "budget: got 1.5"),
        ({"budget": 1}, "budget: got the int 1"),
        ({"budget": "many"}, "budget: got 'many'"),
        ({"batch_size": "auto"}, "batch_size: got 'auto', expected 1"),
        ({"dtype": "Tensor"}, "dtype: got 'Tensor'"),
        ({"device": "abacus"}, "device: got 'abacus'"),
        ({"conv_template": "vicuna"}, "conv_template: got an unknown argument"),
        ({"policy": "tuned", "smoothing": 2}, "smoothing: got 2"),
        ({"pretrained": str(Path(__file__).parent)}, "pretrained: got"),
    ],
)
def test_wrong_arguments_are_named(lmms_model, arguments, message):
    with pytest.raises(ValueError, match=message):
        make(lmms_model, **arguments)


def test_several_processes_are_refused(lmms_model, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(NotImplementedError, match="WORLD_SIZE"):
        make(lmms_model)


def test_what_cannot_be_measured_is_refused(lmms_model, forms):
    model = make(lmms_model)
    with pytest.raises(NotImplementedError, match="loglikelihood"):
        model.loglikelihood([])
    with pytest.raises(NotImplementedError, match="generate_until_multi_round"):
        model.generate_until_multi_round([])
    with pytest.raises(NotImplementedError, match="doc_to_visual: got str"):
        ask(model, forms[:1], visuals=lambda doc: ["film.mp4"])
    with pytest.raises(NotImplementedError, match="context: got <image>"):
        ask(model, forms[:1], context="<image> What is it?")
    with pytest.raises(ValueError, match="until: got 3"):
        ask(model, forms[:1], {"until": 3})
    assert model.kept_shares == [] and isinstance(model.model, torch.nn.Module)
