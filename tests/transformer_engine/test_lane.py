"""Outside of its lane this folder has one test, and that is skipped: tools/te_lane.sh."""

from __future__ import annotations

import os

import pytest

pytestmark = pytest.mark.skipif(
    not os.environ.get("MTP_TE_LANE"), reason="needs the real Transformer Engine: bash tools/te_lane.sh"
)


def test_the_real_one_is_imported_and_there_is_no_gpu() -> None:
    import torch

    from mtp_megatron.compat import packages
    from tests.transformer_engine import pretend

    engine = pretend.import_transformer_engine()
    import transformer_engine_torch as native

    assert native.__file__.endswith(".so")
    assert engine.module.base.tex is native
    package = packages.transformer_engine(cuda=True)
    assert package.state is packages.State.USABLE
    assert packages.transformer_engine_pin().contains(package.version)
    assert not torch.cuda.is_available()
