"""Models on meshes that do not go with them."""

from dataclasses import replace

import pytest
import tiny
import torch

from megatron_core_impl.config import Layout
from megatron_core_impl.mesh import Mesh
from megatron_core_impl.parallel.parallelize import parallelize


def test_a_mesh_that_knows_nothing_of_shared_heads() -> None:
    mesh = replace(Mesh.single("meta"), layout=Layout(tp=4))
    text = r"at tp=4, 2 ranks hold each key/value head .*: init_mesh needs kv_replicas=2"
    with pytest.raises(AssertionError, match=text):
        parallelize(tiny.GROUPED, mesh, dtype=torch.float32)
    parallelize(tiny.TIED, mesh, dtype=torch.float32)  # a head for each rank
