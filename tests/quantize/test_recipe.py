"""Recipes: the built-in ones, what a file may say, what the command line changes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fourge.calibrate.corpus import PassSpec
from fourge.calibrate.sources import DatasetId, find_data
from fourge.errors import RecipeError
from fourge.quantize.recipe import Recipe, load_recipe, recipe_names, to_dict, with_overrides

PASS = '[[pass]]\nname = "p"\ndata = ["a/b"]\nsamples = 4\nmax_tokens = 8\n'
TWO_PASSES = PASS + PASS.replace('"p"', '"q"') + "seed = 3\n"


@pytest.fixture
def write(tmp_path):
    def write_recipe(text, name="mine.toml"):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write_recipe


def test_the_built_in_recipes_are_known_by_name():
    assert recipe_names() == ("data", "demo", "glm-5.1")


def test_the_recipe_of_glm_5_1_has_the_three_passes_of_its_model_card():
    recipe = load_recipe("glm-5.1")
    sizes = [(one.name, one.samples, one.min_tokens, one.max_tokens) for one in recipe.passes]
    assert sizes == [
        ("coding", 8192, 1, 1024),
        ("broad", 4096, 1, 1024),
        ("deep", 256, 8192, 8192),
    ]
    assert recipe.passes[1].data == ("allenai/WildChat-nontoxic", "lmsys/lmsys-chat-1m")
    places = [place for one in recipe.passes for place in find_data(one.data)]
    assert all(isinstance(place, DatasetId) for place in places)
    assert len({one.seed for one in recipe.passes}) == 3


def test_the_demo_recipe_names_the_bundled_conversations():
    recipe = with_overrides(load_recipe("demo"))
    names = [Path(item).name for one in recipe.passes for item in one.data]
    assert names == ["coding.jsonl", "broad.jsonl", "deep.jsonl"]
    assert all(Path(item).is_file() for one in recipe.passes for item in one.data)


def test_the_data_recipe_demands_data():
    recipe = load_recipe("data")
    assert recipe.passes == (PassSpec("data", (), 8192, 1, 8192, 0, open_ended=True),)
    with pytest.raises(RecipeError, match=r"no data for pass data: give some with --data PATH"):
        with_overrides(recipe)
    assert with_overrides(recipe, data=["x.jsonl"]).passes[0].data == ("x.jsonl",)


def test_a_short_file_gets_the_defaults(write):
    assert load_recipe(write(PASS)) == Recipe(
        name="mine",
        method="max",
        mtp="bf16",
        input_scale="layer",
        input_headroom=1.0,
        batch_tokens=8192,
        max_bad_share=0.1,
        passes=(PassSpec("p", ("a/b",), 4, 1, 8, 0),),
    )


def test_every_key_of_a_file_is_used(write):
    head = 'method = "mse"\nmtp = "drop"\nbatch_tokens = 64\nmax_bad_share = 1\n'
    head += 'input_scale = "expert"\ninput_headroom = 2\n'
    recipe = load_recipe(write(head + PASS + "min_tokens = 2\nseed = 9\n"))
    chosen = (recipe.method, recipe.input_scale, recipe.input_headroom)
    assert chosen == ("mse", "expert", 2.0)
    assert (recipe.mtp, recipe.batch_tokens, recipe.max_bad_share) == ("drop", 64, 1.0)
    assert recipe.passes == (PassSpec("p", ("a/b",), 4, 2, 8, 9),)


def test_relative_paths_belong_to_the_folder_of_the_recipe(write, tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "x.jsonl").touch()
    monkeypatch.chdir("/")
    data = 'data = ["a.jsonl", "../b.jsonl", "sub/x.jsonl", "/c.jsonl", "org/name:test"]'
    recipe = load_recipe(write(PASS.replace('data = ["a/b"]', data)))
    assert recipe.passes[0].data == (
        str(tmp_path / "a.jsonl"),
        str(tmp_path.parent / "b.jsonl"),
        str(tmp_path / "sub" / "x.jsonl"),
        "/c.jsonl",
        "org/name:test",
    )


BAD = [
    ('methud = "max"\n' + PASS, "unknown key 'methud': did you mean method?"),
    (PASS + "min_token = 3\n", "unknown key 'min_token': did you mean min_tokens?"),
    ('method = "maxx"\n' + PASS, "is 'maxx', did you mean max? Known are max"),
    ('mtp = "dropp"\n' + PASS, "did you mean drop? Known are bf16, drop"),
    ("mtp = true\n" + PASS, "mtp in"),
    ("batch_tokens = 0\n" + PASS, "batch_tokens in"),
    ("batch_tokens = true\n" + PASS, "is True, needed a whole number from 1"),
    ("max_bad_share = 1.5\n" + PASS, "is 1.5, needed a share from 0 to 1"),
    ("max_bad_share = nan\n" + PASS, "is nan, needed a share from 0 to 1"),
    ('method = "max"\n', "has no passes"),
    ("pass = 3\n", "has no passes"),
    ("pass = []\n", "has 0 passes"),
    (PASS + PASS, "two passes of one name"),
    (PASS.replace('"p"', '"a=b"'), "has a pass with name 'a=b'"),
    (PASS.replace('name = "p"\n', ""), "has a pass with name None"),
    (PASS.replace("max_tokens = 8\n", ""), "has no max_tokens"),
    (PASS.replace("samples = 4", "samples = 0"), "samples in pass p of"),
    (PASS.replace("samples = 4", "samples = 1.5"), "is 1.5, needed a whole number"),
    (PASS + "min_tokens = 9\n", "min_tokens in pass p of"),
    (PASS + "seed = -1\n", "needed a whole number from 0"),
    (PASS.replace('["a/b"]', '"a/b"'), "needed a list of paths and dataset ids"),
    (PASS.replace('["a/b"]', '[""]'), "needed a list of paths and dataset ids"),
    ("method = max\n" + PASS, "is not TOML (Invalid value (at line 1, column 10))"),
]


@pytest.mark.parametrize(("text", "words"), BAD)
def test_a_recipe_that_is_wrong_says_where(write, text, words):
    path = write(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert words in str(caught.value)
    assert path in str(caught.value)


def test_a_recipe_that_is_not_there_lists_the_built_in_ones():
    with pytest.raises(RecipeError, match=r"no recipe glm: .* one of data, demo, glm-5\.1"):
        load_recipe("glm")


def test_given_data_takes_the_place_of_the_recipes_own(write):
    recipe = load_recipe(write(TWO_PASSES))
    changed = with_overrides(recipe, data=["all.jsonl", "q=one.jsonl", "q=two.jsonl"])
    assert changed.passes[0].data == ("all.jsonl",)
    assert changed.passes[1].data == ("all.jsonl", "one.jsonl", "two.jsonl")
    kept = with_overrides(recipe, data=["q=one.jsonl"])
    assert [one.data for one in kept.passes] == [("a/b",), ("one.jsonl",)]
    assert with_overrides(recipe) == recipe


def test_an_unknown_pass_is_refused_unless_it_is_a_path(write, tmp_path, monkeypatch):
    recipe = load_recipe(write(TWO_PASSES.replace('"q"', '"deep"')))
    with pytest.raises(RecipeError, match=r"names pass depp, .* did you mean deep"):
        with_overrides(recipe, data=["depp=x.jsonl"])
    monkeypatch.chdir(tmp_path)
    Path("rate=3.jsonl").touch()
    assert with_overrides(recipe, data=["rate=3.jsonl"]).passes[0].data == ("rate=3.jsonl",)
    assert with_overrides(recipe, data=["x/a=b.jsonl"]).passes[0].data == ("x/a=b.jsonl",)


def test_the_seed_is_added_to_every_pass(write):
    recipe = with_overrides(load_recipe(write(TWO_PASSES)), seed=10)
    assert [one.seed for one in recipe.passes] == [10, 13]


def test_the_other_overrides_are_checked_like_the_file(write):
    recipe = load_recipe(write(PASS))
    changed = with_overrides(recipe, method="max", mtp="drop", max_bad_share=0)
    assert (changed.method, changed.mtp, changed.max_bad_share) == ("max", "drop", 0.0)
    for wrong in ({"method": "mix"}, {"mtp": "fp8"}, {"seed": -1}, {"max_bad_share": 2}):
        with pytest.raises(RecipeError, match=f"{next(iter(wrong))} in the command line"):
            with_overrides(recipe, **wrong)


def test_the_recipe_as_data_knows_no_names_and_no_places(tmp_path):
    described = []
    for name in ("one", "two"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "a.jsonl").touch()
        (folder / f"{name}.toml").write_text(PASS.replace('"a/b"', '"a.jsonl", "org/name"'))
        described.append(to_dict(load_recipe(str(folder / f"{name}.toml"))))
    assert described[0] == described[1]
    assert described[0] == {
        "method": "max",
        "mtp": "bf16",
        "input_scale": "layer",
        "input_headroom": 1.0,
        "batch_tokens": 8192,
        "passes": [{"name": "p", "samples": 4, "min_tokens": 1, "max_tokens": 8, "seed": 0}],
    }
    assert json.loads(json.dumps(described[0])) == described[0]


def test_reading_a_recipe_imports_nothing_heavy():
    script = (
        "import sys; from fourge.quantize.recipe import load_recipe; load_recipe('glm-5.1')\n"
        "heavy = ('torch', 'transformers', 'datasets', 'pyarrow', 'numba')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[]\n", "")
