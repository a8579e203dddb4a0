"""compat: what it replaces and restores, what it refuses and says, what it builds."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from mtp_megatron import compat
from mtp_megatron.compat import cpu, extensions, fallbacks, kernels, packages, report, versions
from mtp_megatron.compat.packages import State
from mtp_megatron.compat.versions import EnvironmentUnsupported

no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a CUDA device")
ROOT = Path(__file__).parents[2]
EXTENSIONS = (*packages.GPU_ONLY, "fused_weight_gradient_mlp_cuda", *kernels._SOFTMAX)


def run(code: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run Python in a new process, with `path` in front of the other packages."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(str(p) for p in (path, ROOT) if p)}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300)


def replaced() -> dict[tuple[str, str], Any]:
    """What every row of the tables finds in its owner's own namespace right now."""
    found = {}
    for row in (*cpu.TORCH, *cpu.MEGATRON, *fallbacks.ALL):
        module, _, name = row.owner.rpartition(".")
        owner = importlib.import_module(row.owner) if row.owner in sys.modules else getattr(sys.modules[module], name)
        found[row.owner, row.name] = vars(owner).get(row.name, "inherited")
    return found


@pytest.fixture
def bare() -> Iterator[None]:
    """Megatron imported, nothing replaced; prepared again afterwards."""
    compat.prepare()
    fallbacks.uninstall()
    cpu.uninstall()
    yield
    compat.prepare()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder in front of all others on the import path; what was imported from it goes again, and is forgotten."""
    monkeypatch.syspath_prepend(str(tmp_path))
    former = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] in EXTENSIONS}
    extensions.why_not_importable.cache_clear()
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] in EXTENSIONS]:
        del sys.modules[name]
    sys.modules.update(former)
    extensions.why_not_importable.cache_clear()


def package(folder: Path, name: str, *parts: str, code: str = "") -> None:
    for part in ("", *parts):
        (folder / name / part).mkdir(parents=True, exist_ok=True)
        (folder / name / part / "__init__.py").write_text(code)


def test_import_is_cheap() -> None:
    result = run("import sys, mtp_megatron.compat; print({'torch', 'megatron'} & set(sys.modules))")
    assert result.stdout.strip() == "set()", result.stderr


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="frobnicate"):
        compat.frobnicate  # noqa: B018


@pytest.mark.parametrize("name", compat.__all__)
def test_public_names_are_no_modules(name: str) -> None:
    """A submodule of the same name would take the function's place once imported."""
    assert not (Path(compat.__file__).parent / f"{name}.py").exists()
    assert not isinstance(getattr(compat, name), type(os))


class TestStandIns:
    pytestmark = no_cuda

    def test_install_is_idempotent_and_uninstall_restores_everything(self, bare: None) -> None:
        before, modules = replaced(), set(sys.modules)
        assert cpu.install()
        once = replaced()
        assert cpu.install()
        assert replaced() == once
        changed = {key for key, value in once.items() if value is not before[key]}
        assert changed == {(row.owner, row.name) for row in (*cpu.TORCH, *cpu.MEGATRON)}
        cpu.uninstall()
        assert replaced() == before
        assert set(sys.modules) == modules
        cpu.uninstall()  # nothing left to do

    def test_prepare_repairs_and_can_be_undone(self, bare: None) -> None:
        before = replaced()
        cpu.install()
        needed = {(row.owner, row.name) for row in (*cpu.TORCH, *cpu.MEGATRON, *fallbacks.needed())}
        compat.prepare()
        assert {key for key, value in replaced().items() if value is not before[key]} == needed
        fallbacks.uninstall()
        cpu.uninstall()
        assert replaced() == before

    def test_no_op_with_cuda(self, bare: None, monkeypatch: pytest.MonkeyPatch) -> None:
        before = replaced()
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        assert not cpu.install()
        assert not cpu.installed()
        assert replaced() == before

    def test_failure_in_the_middle_leaves_nothing_replaced(self, bare: None, monkeypatch: pytest.MonkeyPatch) -> None:
        missing = cpu.Replacement("megatron.core.utils", "no_such_name", lambda original: original, "")
        monkeypatch.setattr(cpu, "MEGATRON", (*cpu.MEGATRON, missing))
        before = replaced()
        with pytest.raises(AttributeError, match="no_such_name"):
            cpu.install()
        assert replaced() == before

    def test_tensors(self) -> None:
        compat.prepare()
        for made in (torch.zeros(2, device="cuda"), torch.tensor([1], device="cuda:0"), torch.ones(2).cuda()):
            assert made.device == torch.device("cpu")
        assert torch.empty(2, device="meta").device.type == "meta"
        assert torch.zeros(1, device=torch.cuda.current_device()).device.type == "cpu"
        assert torch.zeros(1).type() == "torch.cuda.FloatTensor"
        assert torch.zeros(1, dtype=torch.bfloat16).type() == "torch.cuda.BFloat16Tensor"
        assert torch.zeros(1).type(torch.float64).dtype == torch.float64
        module = torch.nn.Linear(1, 1)
        assert module.cuda() is module

    def test_seeds_and_states_reach_the_generator(self) -> None:
        compat.prepare()
        torch.cuda.manual_seed(5)
        state = torch.cuda.get_rng_state()
        first = torch.rand(3)
        torch.cuda.set_rng_state(state)
        assert torch.equal(torch.rand(3), first)
        assert torch.equal(torch.Generator().manual_seed(5).get_state(), state)

    def test_megatron_is_imported_without_the_compiler(self) -> None:
        code = """
import sys
import torch
compiler = torch.compile
from mtp_megatron import compat
compat.prepare()
import megatron.core.models.gpt, megatron.core.optimizer, megatron.core.pipeline_parallel
from megatron.core import jit
from megatron.core.fusions.fused_bias_swiglu import swiglu
print("torch._inductor.compile_fx" in sys.modules, torch.compile is compiler, swiglu.__module__, type(swiglu).__name__)
from mtp_megatron.compat import cpu, fallbacks
fallbacks.uninstall()
cpu.uninstall()
print(jit.jit_fuser is compiler)
"""
        result = run(code)
        expected = ["False", "True", "megatron.core.fusions.fused_bias_swiglu", "function", "True"]
        assert result.stdout.split() == expected, result.stderr

    def test_packages_for_gpus_are_hidden_from_megatron(self, tmp_path: Path) -> None:
        for name in ("transformer_engine", "apex"):
            parts = (
                ("pytorch",) if name == "transformer_engine" else ("multi_tensor_apply", "normalization", "optimizers")
            )
            package(tmp_path, name, *parts, code="raise RuntimeError('imported')")
        (tmp_path / "amp_C.py").write_text("raise RuntimeError('imported')")
        code = """
from mtp_megatron import compat
compat.prepare()
from megatron.core import optimizer
from mtp_megatron.compat import cpu, packages
print(optimizer.USING_PYTORCH_OPTIMIZER, packages.apex(False).state.name, packages.transformer_engine(False).state.name)
cpu.uninstall()
import apex
"""
        result = run(code, tmp_path)
        assert result.stdout.split() == ["True", "IDLE", "IDLE"], result.stderr
        assert "RuntimeError: imported" in result.stderr  # visible again


class TestVersions:
    def version(self, folder: Path, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
        (folder / "package_info.py").write_text(f"__version__ = {version!r}\n")
        monkeypatch.setattr(versions, "megatron_core_folder", lambda: folder)

    def test_installed(self) -> None:
        assert compat.MCORE_VERSION in versions.SUPPORTED
        assert versions.installed_version("megatron-core") == compat.MCORE_VERSION

    @pytest.mark.parametrize("version", ["0.16.0", "0.16.0rc1", "0.20.0", "0.20.0rc0", "1.0.0"])
    def test_unsupported(self, version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.version(tmp_path, monkeypatch, version)
        with pytest.raises(EnvironmentUnsupported, match=rf"megatron-core {version} .*pip install") as error:
            versions.require_megatron_core()
        assert str(tmp_path) in str(error.value)

    @pytest.mark.parametrize("version", ["0.16.1", "0.17.0rc2", "0.19.2", "0.19.2+local"])
    def test_supported(self, version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.version(tmp_path, monkeypatch, version)
        assert str(versions.require_megatron_core()) == version.partition("+")[0]

    def test_the_commit_of_a_repository_around_the_environment_is_left_out(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Hosts compare this version, and one without git, or with a younger commit, is no other megatron-core."""
        self.version(tmp_path, monkeypatch, "0.19.2+eaad30b")
        here = compat.MCORE_VERSION
        self.version(tmp_path, monkeypatch, "0.19.2")
        assert here == compat.MCORE_VERSION
        assert str(here) == "0.19.2"

    def test_missing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(versions, "megatron_core_folder", lambda: None)
        with pytest.raises(EnvironmentUnsupported, match=r"not installed.*pip install"):
            versions.require_megatron_core()

    def test_a_checkout_on_the_path_counts_not_the_metadata(self, tmp_path: Path) -> None:
        package(tmp_path, "megatron/core")
        (tmp_path / "megatron/core/package_info.py").write_text("__version__ = '0.14.0'\n")
        result = run("from mtp_megatron import compat; compat.prepare()", tmp_path)
        assert f"megatron-core 0.14.0 ({tmp_path}/megatron/core) is not supported" in result.stderr


class TestPackages:
    def test_apex_of_pypi_is_named(self, folder: Path) -> None:
        package(folder, "apex", "lib")
        assert packages.apex(cuda=True).state is State.WRONG
        with pytest.raises(EnvironmentUnsupported, match="not NVIDIA's Apex; run: pip uninstall apex") as error:
            packages.require_no_wrong_package(cuda=True)
        assert str(folder / "apex") in str(error.value)

    def test_apex_without_extensions_is_named(self, folder: Path) -> None:
        package(folder, "apex", "multi_tensor_apply", "normalization", "optimizers")
        with pytest.raises(EnvironmentUnsupported, match="no CUDA extensions"):
            packages.require_no_wrong_package(cuda=True)

    def test_right_apex(self, folder: Path) -> None:
        package(folder, "apex", "multi_tensor_apply", "normalization", "optimizers")
        (folder / "amp_C.py").write_text("")
        assert packages.apex(cuda=True).state is State.USABLE
        assert packages.apex(cuda=False).state is State.IDLE
        packages.require_no_wrong_package(cuda=True)

    @no_cuda
    def test_megatron_core_and_the_fusions_take_the_right_apex(self, tmp_path: Path) -> None:
        """In a process that believes in a GPU; the packages have the names that megatron-core imports, and no more."""
        parts = {
            "apex/optimizers": "class FusedAdam: pass\nclass FusedSGD: pass",
            "apex/multi_tensor_apply": "def multi_tensor_applier(*args): pass",
            "apex/normalization/fused_layer_norm": "class FusedLayerNormAffineFunction: pass",
        }
        package(tmp_path, "apex", *(part.removeprefix("apex/") for part in parts), "normalization")
        for part, code in parts.items():
            (tmp_path / part / "__init__.py").write_text(code)
        (tmp_path / "amp_C.py").write_text("multi_tensor_l2norm = multi_tensor_scale = None")
        (tmp_path / "fused_weight_gradient_mlp_cuda.py").write_text("")
        code = """
import torch
torch.cuda.is_available = lambda: True
from mtp_megatron import compat
from megatron.core.models import backends
from megatron.core.optimizer import Adam, clip_grads
print(Adam.__module__, clip_grads.multi_tensor_applier.__module__)
print(backends.LocalSpecProvider().layer_norm(rms_norm=False).__name__)
print(compat.fusions()["gradient_accumulation_fusion"], compat.slower_without_apex())
"""
        result = run(code, tmp_path)
        assert result.stdout.split() == ["apex.optimizers", "apex.multi_tensor_apply", "FusedLayerNorm", "True", "None"]

    def test_a_missing_apex_is_one_line_on_gpus_alone(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        assert compat.slower_without_apex(cuda=False) is None
        monkeypatch.setattr(packages, "locate", lambda name: None)
        said = compat.slower_without_apex(cuda=True)
        assert said is not None
        assert re.search(r"^without NVIDIA Apex .* Adam and gradient clipping .* LayerNorm .* weight gradients", said)
        assert "\n" not in said
        monkeypatch.undo()
        monkeypatch.syspath_prepend(str(folder))
        package(folder, "transformer_engine", "pytorch")
        said = compat.slower_without_apex(cuda=True)
        assert said is not None
        assert "Adam" not in said, "Transformer Engine brings one"
        assert "weight gradients" in said
        package(folder, "apex", "multi_tensor_apply", "normalization", "optimizers")
        (folder / "amp_C.py").write_text("")
        said = compat.slower_without_apex(cuda=True)
        assert said is not None
        assert said.startswith("without Apex's fused_weight_gradient_mlp_cuda")
        (folder / "fused_weight_gradient_mlp_cuda.py").write_text("")
        assert compat.slower_without_apex(cuda=True) is None

    @pytest.mark.parametrize(
        "error",
        ["ImportError('undefined symbol: _ZN3c10')", "OSError('libcudart.so.12')", "AssertionError('torch 2.1')"],
    )
    def test_extensions_of_another_torch_are_wrong(
        self, error: str, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        said = error.partition("'")[2].partition("'")[0]
        package(folder, "transformer_engine", "pytorch")
        package(folder, "apex", "multi_tensor_apply", "normalization", "optimizers")
        for file in ("transformer_engine/pytorch/__init__", *EXTENSIONS[2:]):
            (folder / f"{file}.py").write_text(f"raise {error}")
        found = {found.name: found for found in (packages.transformer_engine(True), packages.apex(True))}
        assert {one.state for one in found.values()} == {State.WRONG}
        assert all(said in one.detail and str(torch.__version__) in one.detail for one in found.values())
        assert "pip uninstall apex" in found["apex"].detail
        with pytest.raises(EnvironmentUnsupported, match=rf"cannot be used: .*{said}"):
            packages.require_no_wrong_package(cuda=True)
        with pytest.raises(EnvironmentUnsupported, match=rf"asked for, but it is wrong .*{said}"):
            packages.require_transformer_engine(cuda=True)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        off = {fusion.setting: fusion.why_not for fusion in kernels.FUSIONS if "triton" not in fusion.needs}
        assert off.pop("persist_layer_norm")
        assert len(off) == 3
        assert all(reason is not None and said in reason for reason in off.values()), off
        slower = compat.slower_without_apex()
        assert slower is not None
        assert said in slower

    def test_without_a_device_nothing_is_imported_to_find_out(self, folder: Path) -> None:
        for name, parts in (
            ("transformer_engine", ("pytorch",)),
            ("apex", ("multi_tensor_apply", "normalization", "optimizers")),
        ):
            package(folder, name, *parts, code="raise ImportError('imported')")
        (folder / "amp_C.py").write_text("raise ImportError('imported')")
        assert packages.transformer_engine(False).state is State.IDLE
        assert packages.apex(False).state is State.IDLE
        packages.require_no_wrong_package(cuda=False)

    def test_transformer_engine_for_this_torch_is_built_and_not_taken_from_a_cache(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        package(folder, "transformer_engine/pytorch", code="raise ImportError")
        package(folder, "transformer_engine")
        known = {"transformer-engine-torch": Version("2.11.0")}
        monkeypatch.setattr(packages, "installed_version", known.get)
        detail = packages.transformer_engine(True).detail
        assert detail.endswith(
            "build it again for this torch: pip install --no-build-isolation --no-cache-dir --force-reinstall "
            "--no-deps transformer-engine-torch==2.11.0"
        )

    def test_transformer_engine_is_installed_in_the_range_that_megatron_core_names(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(packages, "transformer_engine_pin", lambda: SpecifierSet(">=2.9,<2.12"))
        command = r'pip install --no-build-isolation "transformer-engine\[pytorch\]<2\.12,>=2\.9"'
        assert re.fullmatch(command, packages.install_transformer_engine())
        monkeypatch.setattr(packages, "locate", lambda name: None)
        with pytest.raises(EnvironmentUnsupported, match=command):
            packages.require_transformer_engine(cuda=True)

    @pytest.mark.parametrize("part", ["cu13/include", "cuda_runtime/include"])
    @pytest.mark.parametrize("toolkit", ["CUDA_HOME", "CUDA_DIR", "NVTE_CUDA_INCLUDE_DIR", "default"])
    def test_headers_of_torchs_cuda_are_named_where_there_are_no_others(
        self, part: str, toolkit: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name in ("CUDA_HOME", "CUDA_DIR", "NVTE_CUDA_INCLUDE_DIR"):
            monkeypatch.setenv(name, "")
        monkeypatch.setattr(packages, "_TOOLKIT", str(tmp_path / "nowhere"))
        wheels = SimpleNamespace(submodule_search_locations=[str(folder / "nvidia")])  # not those of this environment
        monkeypatch.setattr(packages, "locate", {"nvidia": wheels}.get)
        monkeypatch.setenv("CUDA_HOME", str(tmp_path / "without headers"))
        (folder / "nvidia" / part).mkdir(parents=True)
        packages.name_cuda_headers()
        assert not os.environ["NVTE_CUDA_INCLUDE_DIR"]

        (folder / "nvidia" / part / "cuda_runtime.h").write_text("")
        packages.name_cuda_headers()
        assert os.environ["NVTE_CUDA_INCLUDE_DIR"] == str(folder / "nvidia" / part)

        own = tmp_path / "toolkit" / ("" if toolkit.startswith("NVTE") else "include")
        own.mkdir(parents=True)
        (own / "cuda_runtime.h").write_text("")
        monkeypatch.setenv("NVTE_CUDA_INCLUDE_DIR", "")
        if toolkit == "default":
            monkeypatch.setattr(packages, "_TOOLKIT", str(tmp_path / "toolkit"))
        else:
            monkeypatch.setenv(toolkit, str(tmp_path / "toolkit"))
        packages.name_cuda_headers()
        assert os.environ["NVTE_CUDA_INCLUDE_DIR"] in ("", str(tmp_path / "toolkit"))

    @pytest.mark.parametrize("slower", ["without NVIDIA Apex this is slower", None])
    def test_a_run_says_it_once(self, slower: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
        from mtp_megatron.training import loop
        from mtp_megatron.training.recipe import Recipe

        monkeypatch.setattr(compat, "slower_without_apex", lambda: slower)
        monkeypatch.setattr(loop, "count_parameters", lambda trainable: 1)
        said: list[str] = []  # a RunLog's message() is silent on every rank but the first
        plan, folder = SimpleNamespace(world_size=1, changes=()), SimpleNamespace(path="run")
        session = SimpleNamespace(recipe=Recipe(), plan=plan, trainable=None, step=0, origin="", folder=folder)
        loop._Session._announce(session, SimpleNamespace(message=said.append))  # type: ignore[arg-type]
        assert said[1:] == ([slower] if slower else [])

    def test_transformer_engine_without_its_torch_part(self, folder: Path) -> None:
        package(folder, "transformer_engine", "common")
        with pytest.raises(EnvironmentUnsupported, match="PyTorch part"):
            packages.require_no_wrong_package(cuda=True)

    def test_wrong_apex_stops_prepare_and_the_report_says_so(self, tmp_path: Path) -> None:
        package(tmp_path, "apex", "lib")
        result = run("from mtp_megatron import compat; compat.prepare()", tmp_path)
        assert "EnvironmentUnsupported: apex cannot be used" in result.stderr
        result = run("import sys; from mtp_megatron.compat.__main__ import main; sys.exit(main())", tmp_path)
        assert result.returncode == 2
        assert "to run at all: apex cannot be used" in result.stdout
        assert "Traceback" not in result.stderr


class TestReport:
    PARTS = (
        *("python", "device", "torch", "CUDA", "megatron-core", "megatron.training"),
        *("transformer-engine", "apex", "deepspeed", "layers", "optimizer", "stand-ins for CUDA"),
        *("without Apex", "FP8 and FP4 in the trunk", "softmax of the loss", "unembedding's weight gradient"),
    )

    def report(self, *options: str) -> str:
        command = [sys.executable, "-m", "mtp_megatron.compat", *options]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stderr
        return result.stdout

    def test_says_what_is_found_and_used(self) -> None:
        report = self.report()
        for expected in (
            str(compat.MCORE_VERSION),
            torch.__version__,
            compat.backend(),
            "gradient_accumulation_fusion",
        ):
            assert expected in report

    def test_names_everything_that_a_bug_report_needs(self) -> None:
        rows = {line.split("  ")[1] for line in self.report().splitlines() if line.startswith("  ")}
        wanted = {f"{part}" for part in (*self.PARTS, *(fusion.setting for fusion in kernels.FUSIONS))}
        assert {name for name in wanted if not any(row.startswith(name) for row in rows)} == set()

    def test_says_what_the_version_lacks(self) -> None:
        old = compat.MCORE_VERSION.release < (0, 19)
        report = self.report()
        assert ("HybridModel (mtp_megatron.hybrid): it needs megatron-core 0.19" in report) == old
        loop = importlib.util.find_spec("megatron.training")
        assert ("megatron.training             missing" in report) == (loop is None)

    @pytest.mark.parametrize("version", ["0.16.1", "0.19.2+local"])
    def test_refusals_follow_the_version(self, version: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(versions, "megatron_core_version", lambda: Version(version))
        assert any("HybridModel" in line for line in report.refusals()) == (version == "0.16.1")

    @no_cuda
    def test_verbose_gives_every_reason(self) -> None:
        report = self.report("--verbose")
        for row in (*cpu.TORCH, *cpu.MEGATRON, *fallbacks.ALL):
            assert f"{row.owner}.{row.name}: {row.why}" in report


class TestSpecs:
    def config(self, **overrides: Any) -> Any:
        compat.prepare()
        from megatron.core.transformer import TransformerConfig

        settings = {"num_layers": 4, "hidden_size": 32, "num_attention_heads": 4, "normalization": "RMSNorm"}
        return TransformerConfig(**{**settings, "use_cpu_initialization": True, **compat.fusions(), **overrides})

    def test_layer_is_megatrons_own(self) -> None:
        parts = compat.layer_spec(self.config()).submodules
        assert parts.self_attention.submodules.linear_qkv.__name__ == "ColumnParallelLinear"
        assert parts.input_layernorm.__name__ == "WrappedTorchNorm"
        assert parts.sharded_state_dict_keys_map["input_layernorm."] == "self_attention.linear_qkv.layer_norm_"

    @pytest.mark.parametrize("normalization", ["RMSNorm", "LayerNorm"])
    @pytest.mark.parametrize("sequence_parallel", [False, True])
    def test_norm(self, normalization: str, sequence_parallel: bool) -> None:
        size = {"tensor_model_parallel_size": 2} if sequence_parallel else {}
        config = self.config(normalization=normalization, sequence_parallel=sequence_parallel, **size)
        norm = compat.norm_class(config)(config=config, hidden_size=8, eps=1e-3)
        assert isinstance(norm, getattr(torch.nn, normalization))
        assert norm.eps == 1e-3
        assert config.sequence_parallel is sequence_parallel
        assert {parameter.sequence_parallel for parameter in norm.parameters()} == {sequence_parallel}

    @no_cuda
    def test_transformer_engine_is_refused_without_a_device(self) -> None:
        with pytest.raises(EnvironmentUnsupported, match="Transformer Engine was asked for"):
            compat.layer_spec(self.config(), transformer_engine=True)

    def test_fusions_are_settings_of_megatron(self) -> None:
        config = self.config()
        assert set(compat.fusions()) <= {field.name for field in fields(config)}
        if not torch.cuda.is_available():
            assert not any(compat.fusions().values())


@no_cuda
def test_device_and_backend() -> None:
    assert compat.device() == torch.device("cpu")
    assert compat.backend() == "gloo"


@no_cuda
def test_stand_ins_leave_device_contexts_alone() -> None:
    """In a fresh process: torch remembers the constructors that it sees first."""
    code = """
import torch
from mtp_megatron.compat import cpu
assert cpu.install()
with torch.device("meta"):
    made = [torch.empty(2), torch.zeros(2), torch.ones(2), torch.tensor([1.0])]
assert [tensor.device.type for tensor in made] == ["meta"] * 4, made
"""
    result = run(code)
    assert result.returncode == 0, result.stderr
