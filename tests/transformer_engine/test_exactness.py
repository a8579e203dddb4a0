"""Loss, accuracy and all gradients of a model of Transformer Engine's modules against the oracle, in fp32."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.distributed import test_document_attention, test_exactness, test_experts, test_heads_on_stages, test_hybrid
from tests.harness import run_world
from tests.parity import Step, assemble, assert_same_step, gradient_problems, make_parameters, reference_step
from tests.transformer_engine.loops import steps

pytestmark = pytest.mark.timeout(900)

LAYOUTS = {
    **test_exactness.LAYOUTS,
    **{f"experts-{name}": case for name, case in test_experts.LAYOUTS.items()},
    "experts-one after the other": replace(test_experts.LAYOUTS["4-experts-top2"], config={"moe_grouped_gemm": False}),
    **{f"spread-{name}": case for name, case in test_heads_on_stages.CASES.items()},
    **{f"documents-{name}": case for name, case in test_document_attention.LAYOUTS.items() if case.pattern is None},
    **({f"hybrid-{name}": case for name, case in test_hybrid.LAYOUTS.items()} if test_hybrid.HAS_HYBRID else {}),
}
# Its ring of attention, and communication that is overlapped, are kernels of a GPU.
CASES = {
    name: replace(case, engine=True)
    for name, case in LAYOUTS.items()
    if case.cp == 1 and not case.overlap and not case.distributed_optimizer
}


@pytest.fixture(scope="module")
def found() -> dict[str, Step]:
    """Each case's step; the processes of a world take one after the other."""
    gathered = {}
    for world in {case.world for case in CASES.values()}:
        names = [name for name, case in CASES.items() if case.world == world]
        ranks = run_world(steps, world, [CASES[name] for name in names], fresh=True, timeout=600)
        for name, results in zip(names, zip(*ranks, strict=True), strict=True):
            gathered[name] = assemble(CASES[name], list(results))
            case, layers = CASES[name], [kind for result in results for kind in result["engine"]]
            assert len(layers) >= 4 * case.num_trunk_layers, "four matrices a layer: control, they are the engine's"
            grouped = sum("Grouped" in kind for kind in layers)
            wanted = case.experts is not None and case.config.get("moe_grouped_gemm", True)
            assert grouped >= 2 * case.num_trunk_layers if wanted else not grouped, (
                "control: of all of a rank's experts"
            )
    return gathered


@pytest.mark.parametrize("name", CASES)
def test_layout_equals_reference(found: dict[str, Step], name: str) -> None:
    case = CASES[name]
    assert_same_step(found[name], reference_step(case, make_parameters(case)), 1e-5)


def test_control_other_weights_would_be_noticed(found: dict[str, Step]) -> None:
    case = CASES["one"]
    assert gradient_problems(found["one"], reference_step(case, make_parameters(case, seed=1)), 1e-5)
