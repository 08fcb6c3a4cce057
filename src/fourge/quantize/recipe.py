"""What a run shall do, from a TOML file: method, MTP layer, calibration passes.

Every key is checked for name, type and range when the file is read; an unknown one is an error
that names the nearest known one. Relative data paths belong to the folder of the recipe. Knows
nothing of the model that it will be used on, and imports no torch.
"""

import difflib
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from fourge.calibrate.corpus import MAX_PASSES, PassSpec
from fourge.calibrate.kinds import Kind
from fourge.errors import RecipeError

# What each method needs to know of the inputs of experts.
NEEDS: Final[Mapping[str, Kind]] = {
    "max": Kind.NONE,
    "four-over-six": Kind.NONE,
    "mse": Kind.NONE,
    "weighted-mse": Kind.DIAGONAL,
    "local-hessian": Kind.BLOCKS,
    "local-hessian+gptq": Kind.FULL,
    "local-hessian+descent": Kind.FULL,
}
METHODS: Final = tuple(NEEDS)
INPUT_SCALES: Final = ("layer", "expert")
MOST_HEADROOM: Final = 1024.0
MTP_CHOICES: Final = ("bf16", "drop")
DEFAULT_BATCH_TOKENS: Final = 8192
DEFAULT_MAX_BAD_SHARE: Final = 0.1
MOST_SAMPLES: Final = 8192  # of a pass that names no number

RECIPES_FOLDER: Final = Path(__file__).resolve().parent.parent / "recipes"
RECIPE_KEYS: Final = (
    "method", "mtp", "input_scale", "input_headroom", "batch_tokens", "max_bad_share", "pass",
)  # fmt: skip
PASS_KEYS: Final = ("name", "data", "samples", "min_tokens", "max_tokens", "seed")
PASS_NAME: Final = re.compile(r"[A-Za-z0-9_-]+")
PASS_DATA: Final = re.compile(r"(?P<name>[A-Za-z0-9_-]+)=(?P<path>.+)", re.DOTALL)
LIMIT: Final = 2**31


@dataclass(frozen=True, slots=True)
class Recipe:
    """A checked recipe.

    name: the built-in name or the file's stem. method: how scales and codes are chosen. mtp: what
    becomes of the MTP layer. input_scale: whose largest activation an expert's input_scale comes
    from, the layer's or its own; input_headroom: what it is multiplied with. batch_tokens: tokens
    that go through a layer together. max_bad_share: share of unusable records, 0 to 1, above which
    a pass stops the run.
    """

    name: str
    method: str
    mtp: str
    input_scale: str
    input_headroom: float
    batch_tokens: int
    max_bad_share: float
    passes: tuple[PassSpec, ...]


def recipe_names() -> tuple[str, ...]:
    """The built-in recipes, sorted."""
    return tuple(sorted(path.stem for path in RECIPES_FOLDER.glob("*.toml")))


def load_recipe(name_or_path: str) -> Recipe:
    """The built-in recipe of that name, or the one in that TOML file; RecipeError if unfit.

    A recipe may leave out the data of its passes: ``with_overrides`` demands that it is then given.
    """
    built_in = name_or_path in recipe_names()
    path = RECIPES_FOLDER / f"{name_or_path}.toml" if built_in else Path(name_or_path).expanduser()
    if not path.is_file():
        raise RecipeError(
            f"there is no recipe {name_or_path}: give a TOML file, or one of"
            f" {', '.join(recipe_names())}."
        )
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not TOML ({error}): mend that line.") from error
    except OSError as error:
        raise RecipeError(f"cannot read the recipe {path}: {error.strerror}.") from error
    return _parse_recipe(raw, path)


def with_overrides(
    recipe: Recipe,
    *,
    data: Sequence[str] = (),
    method: str | None = None,
    mtp: str | None = None,
    input_scale: str | None = None,
    input_headroom: float | None = None,
    seed: int | None = None,
    max_bad_share: float | None = None,
) -> Recipe:
    """The recipe as the command line changes it; RecipeError if a pass is then without data.

    Each ``data`` is PATH, for every pass, or PASS=PATH, for that pass; what is given for a pass
    takes the place of the recipe's own. ``seed`` is added to the seed of every pass, so that
    passes with different seeds stay different.
    """
    place = "the command line"
    shift = 0 if seed is None else _whole("seed", seed, place, least=0)
    given = _data_by_pass(recipe, data)
    passes = tuple(
        replace(spec, data=given[spec.name] or spec.data, seed=spec.seed + shift)
        for spec in recipe.passes
    )
    for spec in passes:
        if not spec.data:
            raise RecipeError(
                f"recipe {recipe.name} has no data for pass {spec.name}: give some with --data PATH"
                f" (or --data {spec.name}=PATH), or choose a recipe that has (--recipe)."
            )
    return replace(
        recipe,
        passes=passes,
        method=recipe.method if method is None else _choice("method", method, METHODS, place),
        mtp=recipe.mtp if mtp is None else _choice("mtp", mtp, MTP_CHOICES, place),
        input_scale=recipe.input_scale
        if input_scale is None
        else _choice("input_scale", input_scale, INPUT_SCALES, place),
        input_headroom=recipe.input_headroom
        if input_headroom is None
        else _headroom(input_headroom, place),
        max_bad_share=recipe.max_bad_share
        if max_bad_share is None
        else _share("max_bad_share", max_bad_share, place),
    )


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """The recipe as JSON-able data, as far as it decides what a run makes.

    Neither names nor places of files are in it, nor the recipe's own: what data there is is for
    ``calibrate.sources.identify_data`` to say.
    """
    passes = []
    for spec in recipe.passes:
        entry = asdict(spec)
        del entry["data"], entry["open_ended"], entry["most_tokens"], entry["from_recipe"]
        passes.append(entry)
    return {
        "method": recipe.method,
        "mtp": recipe.mtp,
        "input_scale": recipe.input_scale,
        "input_headroom": recipe.input_headroom,
        "batch_tokens": recipe.batch_tokens,
        "passes": passes,
    }


def _data_by_pass(recipe: Recipe, data: Sequence[str]) -> dict[str, tuple[str, ...]]:
    names = [spec.name for spec in recipe.passes]
    given: dict[str, list[str]] = {name: [] for name in names}
    for item in data:
        match = PASS_DATA.fullmatch(item)
        if match and match["name"] in given:
            given[match["name"]].append(match["path"])
        elif match and not Path(item).exists():
            raise RecipeError(
                f"--data {item} names pass {match['name']}, recipe {recipe.name} has"
                f" {', '.join(names)}: did you mean {_nearest(match['name'], names)}?"
            )
        else:
            for paths in given.values():
                paths.append(item)
    return {name: tuple(paths) for name, paths in given.items()}


# ---- from TOML to a Recipe


def _parse_recipe(raw: Mapping[str, Any], path: Path) -> Recipe:
    place = str(path)
    _refuse_unknown(raw, RECIPE_KEYS, place)
    passes = raw.get("pass")
    if not isinstance(passes, list) or not all(isinstance(entry, dict) for entry in passes):
        raise RecipeError(f"{place} has no passes: write each under a line [[pass]].")
    if not 0 < len(passes) <= MAX_PASSES:
        raise RecipeError(f"{place} has {len(passes)} passes, needed 1 to {MAX_PASSES}.")
    specs = tuple(_parse_pass(entry, path) for entry in passes)
    names = [spec.name for spec in specs]
    if len(set(names)) < len(names):
        raise RecipeError(f"{place} has two passes of one name ({', '.join(names)}): rename one.")
    return Recipe(
        name=path.stem,
        method=_choice("method", raw.get("method", METHODS[0]), METHODS, place),
        mtp=_choice("mtp", raw.get("mtp", MTP_CHOICES[0]), MTP_CHOICES, place),
        input_scale=_choice(
            "input_scale", raw.get("input_scale", INPUT_SCALES[0]), INPUT_SCALES, place
        ),
        input_headroom=_headroom(raw.get("input_headroom", 1.0), place),
        batch_tokens=_whole("batch_tokens", raw.get("batch_tokens", DEFAULT_BATCH_TOKENS), place),
        max_bad_share=_share(
            "max_bad_share", raw.get("max_bad_share", DEFAULT_MAX_BAD_SHARE), place
        ),
        passes=specs,
    )


def _parse_pass(raw: Mapping[str, Any], path: Path) -> PassSpec:
    name = raw.get("name")
    if not isinstance(name, str) or not PASS_NAME.fullmatch(name):
        raise RecipeError(
            f"{path} has a pass with name {name!r}: give each pass a name of letters, digits,"
            " - and _."
        )
    place = f"pass {name} of {path}"
    _refuse_unknown(raw, PASS_KEYS, place)
    if "max_tokens" not in raw:
        raise RecipeError(f"{place} has no max_tokens: add a line max_tokens = NUMBER.")
    data = raw.get("data", [])
    if not isinstance(data, list) or not all(isinstance(item, str) and item for item in data):
        raise RecipeError(
            f"data in {place} is {data!r}, needed a list of paths and dataset ids in quotes."
        )
    max_tokens = _whole("max_tokens", raw["max_tokens"], place)
    min_tokens = _whole("min_tokens", raw.get("min_tokens", 1), place)
    if min_tokens > max_tokens:
        raise RecipeError(
            f"min_tokens in {place} is {min_tokens}, more than max_tokens ({max_tokens}): lower it."
        )
    return PassSpec(
        name=name,
        data=tuple(_resolve(item, path.parent) for item in data),
        samples=_whole("samples", raw.get("samples", MOST_SAMPLES), place),
        min_tokens=min_tokens,
        max_tokens=max_tokens,
        seed=_whole("seed", raw.get("seed", 0), place, least=0),
        open_ended="samples" not in raw,
    )


def _resolve(item: str, folder: Path) -> str:
    """A path in a recipe belongs to the recipe's folder; what is no path there is a dataset id."""
    path = folder / Path(item).expanduser()
    is_path = item.startswith((".", "~", "/")) or "/" not in item or path.exists()
    return str(path.resolve()) if is_path else item


def _refuse_unknown(raw: Mapping[str, Any], known: Sequence[str], place: str) -> None:
    for key in raw:
        if key not in known:
            raise RecipeError(
                f"{place} has the unknown key {key!r}: did you mean {_nearest(key, known)}?"
                f" Known are {', '.join(known)}."
            )


def _nearest(word: str, known: Iterable[str]) -> str:
    return difflib.get_close_matches(word, list(known), n=1, cutoff=0.0)[0]


def _choice(key: str, value: object, known: Sequence[str], place: str) -> str:
    if not isinstance(value, str) or value not in known:
        raise RecipeError(
            f"{key} in {place} is {value!r}, did you mean {_nearest(str(value), known)}?"
            f" Known are {', '.join(known)}."
        )
    return value


def _whole(key: str, value: object, place: str, *, least: int = 1) -> int:
    if type(value) is not int or not least <= value < LIMIT:
        raise RecipeError(
            f"{key} in {place} is {value!r}, needed a whole number from {least} to {LIMIT - 1}."
        )
    return value


def _share(key: str, value: object, place: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise RecipeError(f"{key} in {place} is {value!r}, needed a share from 0 to 1.")
    return float(value)


def _headroom(value: object, place: str) -> float:
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not 1 <= value <= MOST_HEADROOM
    ):
        raise RecipeError(
            f"input_headroom in {place} is {value!r}, needed a number from 1 to"
            f" {MOST_HEADROOM:.0f}."
        )
    return float(value)
