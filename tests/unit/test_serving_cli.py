"""`mtp-megatron generate`: prompts from everywhere, what is printed and written, and every refusal."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from mtp_megatron.checkpoint.convert import convert_to_hf
from mtp_megatron.cli import main
from mtp_megatron.data.tokenizer import ByteTokenizer
from mtp_megatron.errors import ConfigError, DataError
from mtp_megatron.serving import compare
from mtp_megatron.serving.cli import _say_unknown, _text
from mtp_megatron.serving.compare import HeadCount
from mtp_megatron.serving.decode import Generation, generate
from mtp_megatron.serving.export import open_export
from mtp_megatron.serving.llama import HeadsLlama
from mtp_megatron.serving.prompts import from_file, from_held_out
from tests.checkpoints import write_checkpoint


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    write_checkpoint(folder / "run")
    convert_to_hf(folder / "run", folder / "hf", progress=False)
    return folder / "hf"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from mtp_megatron.data.preprocess import PreprocessOptions, preprocess

    folder = tmp_path_factory.mktemp("data")
    for index in range(10):
        (folder / f"{index}.py").write_text(f"{index}" * (10 + 20 * index))
    preprocess(PreprocessOptions(output=folder / "data", paths=(folder,), valid_fraction=0.4, quiet=True))
    return folder / "data"


def test_one_prompt(export: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(export), "--prompt", "def f(x):", "--max-new-tokens", "8", "--quiet"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("def f(x):")
    assert "tokens per forward pass" in out
    assert "1 of 1 texts identical" in out
    rows = [line.split()[0] for line in out.splitlines() if line.strip()[:1].isdigit()]
    assert rows[:2] == ["1", "3"], "without --sweep-heads: plain greedy and all heads"


def test_heads_and_sweep(export: Path, tmp_path: Path) -> None:
    def heads(*options: str) -> list[int]:
        arguments = ["generate", str(export), "--prompt", "a", "--prompt", "bc", "--max-new-tokens", "4", "--quiet"]
        assert main([*arguments, "--json", str(tmp_path / "deep" / "figures.json"), *options]) == 0
        figures = json.loads((tmp_path / "deep" / "figures.json").read_text())
        assert figures["prompts"] == 2
        return [row["heads"] for row in figures["by_heads"]]

    assert heads() == [1, 3]
    assert heads("--heads", "2") == [1, 2]
    assert heads("--heads", "1") == [1]
    assert heads("--sweep-heads") == [1, 2, 3]
    assert heads("--heads", "2", "--sweep-heads") == [1, 2]


def test_different_text_is_an_error(
    export: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    honest = compare.generate

    def sabotaged(*args, heads, **options):  # type: ignore[no-untyped-def]
        generation = honest(*args, heads=heads, **options)
        if heads > 1:
            generation.tokens[2] += 1
        return generation

    monkeypatch.setattr(compare, "generate", sabotaged)
    arguments = ["generate", str(export), "--prompt", "a", "--max-new-tokens", "8", "--quiet"]
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert "1 of 1 texts differ between 3 heads and plain greedy decoding, first in prompt 1 at new token 3" in error
    assert "must not happen in fp32" in error
    assert main([*arguments, "--dtype", "bf16"]) == 1
    assert "decode with --dtype fp32" in capsys.readouterr().err


def test_prompts_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(b"def f():\n    return\n---\r\nclass A:\n\n---\n  x")
    decode = ByteTokenizer().decode
    assert [decode(ids) for ids in from_file(path, ByteTokenizer())] == ["def f():\n    return", "class A:\n", "  x"]
    path.write_bytes(b"\xef\xbb\xbf---\r\na\r\n---\r\n\xef\xbb\xbf")  # a mark within a text is a character of it
    assert from_file(path, ByteTokenizer()) == [list(b"a"), list(b"\xef\xbb\xbf")]
    path.write_text("---\n---\n")
    with pytest.raises(DataError, match="holds no prompt"):
        from_file(path, ByteTokenizer())
    path.write_bytes(b"ab\xff")
    with pytest.raises(DataError, match=r"not UTF-8 \(offset 2\)"):
        from_file(path, ByteTokenizer())
    with pytest.raises(DataError, match="cannot be read"):
        from_file(tmp_path, ByteTokenizer())


def test_held_out_prompts_never_overlap(data: Path) -> None:
    from mtp_megatron.data.manifest import load_manifest

    documents = load_manifest(data).valid.documents
    tokens = load_manifest(data).valid.tokens - documents
    prompts = from_held_out(data, ByteTokenizer(), documents, 10)
    assert all(len(prompt) == 10 and len(set(prompt)) == 1 for prompt in prompts)
    assert len({prompt[0] for prompt in prompts}) == documents, "first the beginning of every document"
    assert ByteTokenizer.eod not in {token for prompt in prompts for token in prompt}
    everything = from_held_out(data, ByteTokenizer(), tokens // 10, 10)
    assert everything[:documents] == prompts
    with pytest.raises(ConfigError, match=rf"make {tokens // 10} prompts of 10 tokens"):
        from_held_out(data, ByteTokenizer(), tokens // 10 + 1, 10)


def test_held_out_prompts_need_the_same_tokenizer(data: Path) -> None:
    tokenizer = ByteTokenizer()
    tokenizer.sha256 = "0" * 64
    with pytest.raises(DataError, match="another tokenizer"):
        from_held_out(data, tokenizer, 1, 10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt", ""], "holds no token"),
        (["--prompt", "a", "--heads", "4"], "--heads=4: the model has heads 1 to 3"),
        (["--prompt", "a", "--max-new-tokens", "128"], "exceeds the model's context of 128"),
        (["--prompt", "a", "--threads", "0"], "--threads=0"),
        (["--prompts-file", "/nowhere"], "/nowhere: cannot be read"),
        (["--prompts-from", "/nowhere"], "/nowhere"),
        (["--prompt", "a", "--max-new-tokens", "2", "--json", "/proc/x/y.json"], "--json='/proc/x/y.json': cannot be"),
    ],
)
def test_refusals(export: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(export), "--quiet", *options]) == 2
    said = capsys.readouterr()
    assert message in said.err
    assert said.out == ""  # nothing was decoded for it


def test_no_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(tmp_path / "x"), "--prompt", "a"]) == 2
    assert "no such folder" in capsys.readouterr().err
    folder = write_checkpoint(tmp_path / "run")
    assert main(["generate", str(folder), "--prompt", "a"]) == 2
    assert "config.json: missing" in capsys.readouterr().err


def test_colours_show_what_was_accepted_together() -> None:
    tokenizer = ByteTokenizer()
    prompt, new = list(b"x "), list("aé bc".encode())
    # The two bytes of é become certain in different passes: the character belongs to the pass that completes it.
    generation = Generation(tokens=new, accepted_together=[1, 1, 3, 1])
    plain, cyan, yellow = "\033[0m", "\033[36m", "\033[33m"
    shown = _text(tokenizer, prompt, generation, colour=True)
    assert shown == f"x {cyan}a{plain}{yellow}{plain}{cyan}é b{plain}{yellow}c{plain}"
    assert _text(tokenizer, prompt, generation, colour=False) == "x aé bc"


def test_ids_that_the_tokenizer_lacks_are_left_out_of_the_text(capsys: pytest.CaptureFixture[str]) -> None:
    """Of a model with model.vocab_size above its tokenizer's, while it has learned little."""
    tokenizer = ByteTokenizer()
    generation = Generation(tokens=[*b"a", 257, *b"b", 300], accepted_together=[1, 2, 1])
    assert _text(tokenizer, list(b"x"), generation, colour=False) == "xab"
    assert re.sub(r"\033\[\d+m", "", _text(tokenizer, list(b"x"), generation, colour=True)) == "xab"
    _say_unknown(HeadCount(2, [generation, generation], 1.0, True), tokenizer)
    assert capsys.readouterr().err.startswith("note: 4 of 8 new tokens are ids that the tokenizer of 257 does not have")
    _say_unknown(HeadCount(2, [Generation(tokens=[256])], 1.0, True), tokenizer)
    assert not capsys.readouterr().err


def test_every_id_that_ends_a_text_ends_it(export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chat model's turn ends with another id than its documents."""

    def new_tokens(*options: str) -> int:
        figures = tmp_path / "figures.json"
        arguments = ["generate", str(export), "--prompt", "ab", "--max-new-tokens", "12", "--json", str(figures)]
        assert main([*arguments, "--quiet", *options]) == 0
        (count,) = json.loads(figures.read_text())["new_tokens"]
        return int(count)

    tokens = generate(HeadsLlama.load(open_export(export)), list(b"ab"), max_new_tokens=12, heads=1).tokens
    assert ByteTokenizer.eod not in tokens
    monkeypatch.setattr(ByteTokenizer, "more_ends", (tokens[5],))
    assert new_tokens() == tokens.index(tokens[5]) + 1
    assert new_tokens("--ignore-eod") == 12


def test_help_needs_neither_torch_nor_an_export(capsys: pytest.CaptureFixture[str]) -> None:
    import subprocess

    program = (
        "import sys; from mtp_megatron.cli import main\n"
        "try: main(['generate', '--help'])\nexcept SystemExit: pass\nassert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.DEVNULL, timeout=120)
