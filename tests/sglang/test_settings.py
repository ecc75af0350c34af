"""The environment variables, and the sentence that a server logs about them."""

import pytest

from vlcache_triton.integrations.sglang.settings import Settings, read_settings
from vlcache_triton.recipe.config import VLCacheConfig
from vlcache_triton.recipe.profile import HeadHits


def test_without_variables_the_recipe_is_the_papers():
    assert read_settings({"HOME": "/root"}) == Settings(VLCacheConfig(), "auto")


def test_every_field_has_a_variable_and_they_win_over_the_json():
    settings = read_settings(
        {
            "VLCACHE_CONFIG": '{"budget": 0.5, "smoothing": 3}',
            "VLCACHE_BUDGET": "0.2",
            "VLCACHE_MAX_QUERY_ROWS": "16",
            "VLCACHE_TEXT_WINDOW": "null",
            "VLCACHE_ALLOCATION": "uniform",
            "VLCACHE_KERNELS": "reference",
        }
    )
    config = VLCacheConfig(budget=0.2, smoothing=3, max_query_rows=16, allocation="uniform")
    assert settings == Settings(config, "reference")


def test_a_profile_is_read(tmp_path):
    (tmp_path / "hits.json").write_text('{"0-0": [1], "0-1": [3]}')
    settings = read_settings({"VLCACHE_PROFILE": str(tmp_path / "hits.json")})
    assert settings.profile == HeadHits([[1.0, 3.0]])
    assert "(layers by a profile)" in settings.describe()
    (tmp_path / "none.json").write_text("{}")
    for name, message in (
        ("no.json", "cannot read"),
        ("none.json", "profile: 'none.json' is none"),
    ):
        with pytest.raises(ValueError, match=f"VLCACHE_PROFILE: {message}"):
            read_settings({"VLCACHE_PROFILE": str(tmp_path / name)})


@pytest.mark.parametrize(
    "environ, message",
    [
        ({"VLCACHE_BUGDET": "0.1"}, "VLCACHE_BUGDET: got a variable of that name"),
        ({"VLCACHE_BUDGET": "1"}, "VLCACHE_BUDGET: budget: got the int 1"),
        ({"VLCACHE_BUDGET": "1.5"}, "VLCACHE_BUDGET: budget: got 1.5"),
        ({"VLCACHE_CONFIG": '{"budget": 1}'}, "VLCACHE_CONFIG: budget: got the int 1"),
        ({"VLCACHE_THRESHOLD": "often"}, "VLCACHE_THRESHOLD: threshold: got 'often'"),
        ({"VLCACHE_ALLOCATION": "fair"}, "VLCACHE_ALLOCATION: allocation: got 'fair'"),
        ({"VLCACHE_CONFIG": "{budget: 1}"}, "VLCACHE_CONFIG: got"),
        ({"VLCACHE_CONFIG": '{"alpha": 0.1}'}, "VLCACHE_CONFIG: got"),
        ({"VLCACHE_KERNELS": "cuda"}, "VLCACHE_KERNELS: got 'cuda'"),
        (
            {"VLCACHE_PRESET": "best"},
            "VLCACHE_PRESET: got 'best', expected one of ('paper', 'tuned')",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_its_variables_name(environ, message):
    with pytest.raises(ValueError, match="VLCACHE_") as error:
        read_settings(environ)
    assert str(error.value).startswith(message)


def test_a_preset_comes_first_and_every_field_wins_over_it():
    settings = read_settings({"VLCACHE_PRESET": "tuned", "VLCACHE_BUDGET": "0.05"})
    assert settings.config == VLCacheConfig.tuned(0.05)
    environ = {"VLCACHE_PRESET": "tuned", "VLCACHE_CONFIG": '{"granularity": "kv_head"}'}
    assert read_settings(environ).config == VLCacheConfig.tuned(granularity="kv_head")
    assert read_settings({"VLCACHE_PRESET": "paper"}) == read_settings({})


@pytest.mark.parametrize(
    "environ",
    [
        {"VLCACHE_CONFIG": '{"row_reduction": "max"}'},
        {"VLCACHE_GROUP_REDUCTION": "max"},
        {"VLCACHE_PRESET": "tuned", "VLCACHE_ROW_REDUCTION": "sum"},
    ],
)
def test_what_chunks_cannot_be_measured_by_is_refused_by_its_variables_name(environ):
    with pytest.raises(NotImplementedError, match=r"^VLCACHE_GROUP_REDUCTION: got .*in SGLang"):
        read_settings(environ)


def test_the_logged_line_says_what_is_on():
    line = read_settings({"VLCACHE_BUDGET": "0.1", "VLCACHE_SMOOTHING": "3"}).describe()
    assert "10% of the prompt's KV cache (smoothing=3)" in line
    assert "not put in the radix cache" in line
    assert "keeps its whole KV cache" in read_settings({"VLCACHE_BUDGET": "1.0"}).describe()
    assert "64 tokens a layer" in read_settings({"VLCACHE_BUDGET": "64"}).describe()


def test_budgets_that_do_not_add_up_are_refused():
    with pytest.raises(NotImplementedError, match=r"^VLCACHE_CLIPPING: got 'paper'.*in SGLang"):
        read_settings({"VLCACHE_CLIPPING": "paper"})


def test_fp8_is_refused():
    message = r"^VLCACHE_KV_CACHE_DTYPE: got 'fp8_e4m3', expected 'auto' in SGLang"
    with pytest.raises(NotImplementedError, match=message):
        read_settings({"VLCACHE_KV_CACHE_DTYPE": "fp8_e4m3"})
