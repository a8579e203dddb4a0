"""The recipes in the paper's sizes: each is accepted at every world size that its comment names, and the comment's
numbers (parameters, layouts, memory) are what the model's code gives."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from mtp_megatron.errors import ConfigError
from mtp_megatron.training.build import build_models, transformer_config
from mtp_megatron.training.recipe import Recipe
from mtp_megatron.training.recipe_io import load_recipe
from mtp_megatron.training.validate import check_recipe, data_parallel_size
from tests.harness import parallel, run_world

FOLDER = Path(__file__).parents[2] / "examples" / "recipes"
SIZES = {"1b3": 1.3e9, "7b": 7e9, "13b": 13e9}  # Gloeckle et al. 2024, table of results by size
RECIPES = [f"paper_{size}{kind}.yaml" for size in SIZES for kind in ("", "_bytes")]
GPUS = {8, 16, 32, 64, 128}
H100_GB = 80
LAYOUT = re.compile(
    r"^#   (?P<gpus>\d+) GPUs: TP(?P<tensor>\d+) x PP(?P<pipeline>\d+) x DP(?P<copies>\d+), (?P<gb>[\d.]+) GB"
    r"(?: *with (?P<settings>.+))?$",
    re.MULTILINE,
)


@dataclass(frozen=True)
class Layout:
    """One line of a recipe's comment."""

    recipe: str
    gpus: int
    tensor: int
    pipeline: int
    copies: int
    gigabytes: float
    settings: tuple[str, ...]

    def load(self) -> Recipe:
        vocabulary = 257 if "bytes" in self.recipe else 32000
        return check_recipe(
            load_recipe(FOLDER / self.recipe, self.settings), world_size=self.gpus, tokenizer_vocab_size=vocabulary
        )


def layouts(name: str) -> list[Layout]:
    return [
        Layout(name, *(int(match[key]) for key in ("gpus", "tensor", "pipeline", "copies")), float(match["gb"]),
               tuple((match["settings"] or "").split()))
        for match in LAYOUT.finditer((FOLDER / name).read_text())
    ]  # fmt: skip


ALL = [layout for name in RECIPES for layout in layouts(name)]


def parameters_by_place(rank: int, world_size: int, names: list[str]) -> dict[str, Counter[str]]:
    """For ``run_world``: parameters of each whole model by where they sit, built on the meta device (no memory)."""
    from mtp_megatron.training.recipe_io import parse_recipe

    counts = {}
    for name in names:
        layout = layouts(name)[0]
        tree = layout.load().model_dump(mode="json")
        tree["parallel"], tree["train"]["transformer_engine"] = {}, False
        recipe = parse_recipe(tree)
        with parallel():
            config = transformer_config(recipe)
            config.perform_initialization = False
            with torch.device("meta"):
                (model,) = build_models(recipe, config)
        counts[name] = Counter()
        for key, parameter in model.named_parameters():
            assert parameter.is_meta
            counts[name][re.match(r"decoder\.layers|embedding|", key)[0] or "last stage"] += parameter.numel()
    return counts


@pytest.fixture(scope="module")
def sizes() -> dict[str, Counter[str]]:
    return run_world(parameters_by_place, 1, RECIPES)[0]


@pytest.mark.parametrize("name", RECIPES)
def test_the_parameter_count_is_the_papers_and_the_comments(name: str, sizes: dict[str, Counter[str]]) -> None:
    said = re.search(r"^# ([\d,]+) parameters", (FOLDER / name).read_text(), re.MULTILINE)
    assert said is not None
    total = sizes[name].total()
    assert int(said[1].replace(",", "")) == total
    assert total == pytest.approx(SIZES[name.split("_")[1].removesuffix(".yaml")], rel=0.08)


def test_the_7b_model_has_exactly_llama_2s_parameters(sizes: dict[str, Counter[str]]) -> None:
    """Parameter-matched: 28 trunk layers and 4 heads are the 32 layers of Llama 2 7B, with 6,738,415,616 parameters."""
    assert sizes["paper_7b.yaml"].total() == 6_738_415_616


@pytest.mark.parametrize("name", RECIPES)
def test_it_follows_the_papers_settings(name: str) -> None:
    recipe = layouts(name)[0].load()
    bytes_level = "bytes" in name
    layers = {"1b3": 24, "7b": 32, "13b": 40}[name.split("_")[1].removesuffix(".yaml")]
    assert recipe.model.num_trunk_layers + recipe.heads.n == layers  # n-1 layers taken away, n-1 heads added
    assert recipe.heads.n == (8 if bytes_level else 4)
    assert recipe.heads.unembedding == ("replicated" if bytes_level else "shared")
    assert recipe.model.seq_length == (8192 if bytes_level else 4096)
    tokens = recipe.train.global_batch_size * recipe.model.seq_length
    assert tokens == (12 if bytes_level else 8) * 2**20
    assert recipe.train.steps * tokens == pytest.approx(313e9 if bytes_level else 200e9, rel=0.05)
    optimizer = recipe.optimizer
    assert (optimizer.lr, optimizer.beta1, optimizer.beta2) == (3e-4, 0.9, 0.95)
    assert (optimizer.weight_decay, optimizer.clip_grad, optimizer.schedule) == (0.1, 1.0, "cosine")
    assert optimizer.min_lr == pytest.approx(0.03 * optimizer.lr)


@pytest.mark.parametrize("name", RECIPES)
def test_the_comment_names_a_layout_for_8_to_128_gpus(name: str) -> None:
    assert {layout.gpus for layout in layouts(name)} == GPUS


@pytest.mark.parametrize("layout", ALL, ids=lambda layout: f"{layout.recipe}-{layout.gpus}-PP{layout.pipeline}")
def test_each_layout_is_accepted_and_is_what_the_comment_says(layout: Layout, sizes: dict[str, Counter[str]]) -> None:
    recipe = layout.load()
    assert (recipe.parallel.tensor, recipe.parallel.pipeline) == (layout.tensor, layout.pipeline)
    assert data_parallel_size(recipe, layout.gpus) == layout.copies
    assert layout.tensor <= 8, "tensor parallelism stays inside a node"
    fullest = largest_stage(recipe, sizes[layout.recipe])
    needs = state_gigabytes(fullest, layout.copies)
    assert layout.gigabytes == pytest.approx(needs, abs=0.05)
    assert needs < H100_GB / 2, "activations need the other half"


def largest_stage(recipe: Recipe, count: Counter[str]) -> float:
    """Parameters of the fullest rank."""
    trunk = recipe.model.num_trunk_layers
    stages = (recipe.parallel.layout or f"E{'t' * trunk}L").split("|")
    return max(
        stage.count("t") * count["decoder.layers"] / trunk
        + stage.count("E") * count["embedding"]
        + stage.count("L") * count["last stage"]
        for stage in stages
    ) / recipe.parallel.tensor  # fmt: skip


def state_gigabytes(parameters: float, copies: int) -> float:
    """bf16 weights and fp32 gradients; fp32 weights and two moments sharded over the copies (distributed optimizer)."""
    return parameters * (2 + 4 + 12 / copies) / 1e9


def test_a_world_that_does_not_fit_is_refused() -> None:
    """The control: what the accepted layouts above have been compared with."""
    recipe = load_recipe(FOLDER / "paper_13b.yaml")
    with pytest.raises(ConfigError, match="multiple of 8 ranks"):
        check_recipe(recipe, world_size=12, tokenizer_vocab_size=32000)


def test_the_readme_of_the_examples_says_the_same(sizes: dict[str, Counter[str]]) -> None:
    text = (FOLDER.parent / "torchrun" / "README.md").read_text()
    rows = dict(re.findall(r"^\| \[`(paper_\w+\.yaml)`\].*?\| \d+ \+ \d+ \| ([\d,]+) \|", text, re.MULTILINE))
    assert {name: int(count.replace(",", "")) for name, count in rows.items()} == {
        name: sizes[name].total() for name in RECIPES
    }
    for path in re.findall(r"examples/\S+?\.(?:sh|sbatch|yaml)", text):
        assert (FOLDER.parents[1] / path).is_file(), path
