import pytest

from hf_distill.cache.registry import ENCODINGS, PRESETS, encoding_from_config, make_encoding


@pytest.mark.parametrize("name", [*ENCODINGS, *PRESETS])
def test_an_encoding_is_made_again_from_its_config(name):
    temperatures = (1.0,) if name in ("sampled", "nano") else (2.0, 0.5)
    encoding = make_encoding(name, vocab_size=151_936, temperatures=temperatures)
    again = encoding_from_config(encoding.config())
    assert type(again) is type(encoding)
    assert again.config() == encoding.config()
    assert encoding.temperatures[0] == 1.0
    assert set(encoding.temperatures) == {1.0, *temperatures}


def test_options_take_the_place_of_defaults_and_of_those_of_a_preset():
    assert make_encoding("topk", vocab_size=100, k=7, bits=None).config()["k"] == 7
    preset = make_encoding("base", vocab_size=100, k=7).config()
    assert preset["k"] == 7
    assert preset["draws"] == PRESETS["base"][1]["draws"]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("topkk", {}, r"Unknown encoding 'topkk'. Did you mean 'topk'"),
        ("smal", {}, r"Did you mean 'small'"),
        ("topk", {"draws": 3}, r"Unknown option of the encoding 'topk': 'draws'.*Known: bits, k"),
        ("nano", {"k": 3}, r"Unknown option of the encoding 'sampled': 'k'"),
        ("topk", {"k": 0}, r"`k` must be a whole number from 1 to 100, .*vocabulary being 100, got 0"),
        ("topk", {"k": 101}, r"`k` must be a whole number from 1 to 100"),
        ("topk", {"k": 1.5}, r"`k` must be a whole number .* got 1.5"),
        ("topk_tail", {"k": 101}, r"`k` must be a whole number from 1 to 100"),
        ("topk_tail", {"draws": 0}, r"`draws` must be a whole number >= 1, got 0"),
        ("sampled", {"draws": True}, r"`draws` must be a whole number >= 1, got True"),
        ("topk", {"bits": 11}, r"`bits` must be a whole number from 2 to 10, got 11"),
        ("topk", {"temperatures": (1.0, 0.0)}, r"`temperature` must be a positive finite number, got 0.0"),
        ("dense", {"temperatures": (-1.0,)}, r"`temperature` must be a positive finite number, got -1.0"),
        ("dense", {"dtype": "bfloat16"}, r"Unknown dtype of the encoding 'dense': 'bfloat16'"),
        ("hidden", {"dtype": "int8"}, r"Unknown dtype of the encoding 'hidden': 'int8'"),
        ("hidden", {"k": 5}, r"Unknown option of the encoding 'hidden': 'k'"),
        ("topk", {"vocab_size": 0}, r"`vocab_size` must be a whole number >= 1, got 0"),
    ],
)
def test_what_does_not_do_is_refused_with_what_does(name, options, message):
    with pytest.raises(ValueError, match=message):
        make_encoding(name, **{"vocab_size": 100, **options})
